"""Validates OCSF events, one JSON object a line, against the published schema of OCSF 1.5.0.

    validate.py FILE        prints how many events of each class there are

The package ocsf-json-schema carries what schema.ocsf.io publishes for 1.5.0 and makes a JSON Schema of it for a class with the profiles
that an event names: required attributes, enumerations, formats, and no attribute that the class does not have.
"""

import collections
import json
import sys

from jsonschema import Draft202012Validator
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema

VERSION = "1.5.0"


def main(path):
    schemas = OcsfJsonSchemaEmbedded(get_ocsf_schema(version=VERSION))
    validators, counts = {}, collections.Counter()
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            event = json.loads(line)
            uid, profiles = event["class_uid"], tuple(sorted(event["metadata"]["profiles"]))
            if event["metadata"]["version"] != VERSION:
                sys.exit(f"line {number}: another version")
            if (uid, profiles) not in validators:
                name = schemas.lookup_class_name_from_uid(uid)
                schema = schemas.get_class_schema(name, list(profiles))
                Draft202012Validator.check_schema(schema)
                validators[uid, profiles] = Draft202012Validator(schema)
            for error in validators[uid, profiles].iter_errors(event):
                sys.exit(f"line {number}: {'/'.join(map(str, error.absolute_path))}: {error.message}")
            if event["type_uid"] != uid * 100 + event["activity_id"]:
                sys.exit(f"line {number}: type_uid is not that of class and activity")
            counts[uid] += 1
    for uid in sorted(counts):
        print(uid, counts[uid])


main(sys.argv[1])
