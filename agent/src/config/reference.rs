//! `docs/configuration.md`, `docs/configuration.schema.json` and the schema of the chart's values: written from the types of
//! [`super::raw`].
//!
//! `cargo xtask docs` writes them; the test that does so fails where they are not what it would write.

use std::fmt::Write as _;

use expect_test::expect_file;
use schemars::{SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value};

use super::{CONFIG_BYTES_MAX, Config, raw::AgentConfiguration};

/// A complete configuration, as it stands in the documentation.
const EXAMPLE: &str = include_str!("example.yaml");

fn schema() -> Value {
    let generator = SchemaGenerator::new(SchemaSettings::draft2020_12());
    let mut root = generator.into_root_schema_for::<AgentConfiguration>().to_value();
    // What may not be empty has a default for the sake of a better message than serde's, and is required all the same.
    let mut required = Vec::new();
    for (name, property) in root["properties"].as_object_mut().expect("has properties") {
        if property.get("minItems").is_some() {
            property.as_object_mut().expect("is an object").remove("default");
            required.push(Value::from(name.as_str()));
        }
    }
    root["required"].as_array_mut().expect("some are required").append(&mut required);
    root
}

/// The chart's own values, with the configuration among them.
fn chart_schema(mut configuration: Value) -> Value {
    let own = include_str!("../../../deploy/helm/values.schema.json");
    let mut values: Value = serde_json::from_str(own).expect("is JSON");
    let root = configuration.as_object_mut().expect("is an object");
    let mut definitions = root.remove("$defs").expect("has definitions");
    root.remove("$schema");
    definitions["AgentConfiguration"] = configuration;
    values["$defs"] = definitions;
    values
}

fn text<'a>(schema: &'a Value, key: &str) -> &'a str {
    schema.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// A definition that `schema` names, directly or as its only other choice beside null, or itself.
fn resolved<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let choices = schema.get("anyOf").and_then(Value::as_array);
    let choice = choices.and_then(|choices| choices.iter().find(|choice| text(choice, "type") != "null"));
    let schema = choice.unwrap_or(schema);
    let name = text(schema, "$ref").rsplit('/').next().unwrap_or_default();
    root["$defs"].get(name).unwrap_or(schema)
}

/// What a value looks like, in words.
fn kind(root: &Value, schema: &Value) -> String {
    let found = resolved(root, schema);
    let one_of = found.get("oneOf").and_then(Value::as_array);
    let names: Vec<&str> = match found.get("enum").and_then(Value::as_array) {
        Some(names) => names.iter().filter_map(Value::as_str).collect(),
        // A choice without a word is one that is read and refused.
        None => one_of.into_iter().flatten().filter_map(|choice| choice.get("const")?.as_str()).collect(),
    };
    if !names.is_empty() {
        return format!("`{}`", names.join("`, `"));
    }
    let types = match &found["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).find(|name| *name != "null"),
        one => one.as_str(),
    };
    match types {
        Some("array") => format!("list of {}", kind(root, &found["items"])),
        Some("object") if found.get("additionalProperties").is_some_and(Value::is_object) => {
            format!("map to {}", kind(root, &found["additionalProperties"]))
        }
        Some("integer") => "integer".to_owned(),
        Some(other) => other.to_owned(),
        None => panic!("{found} says nothing of its type"),
    }
}

fn bounds(schema: &Value) -> String {
    let bound =
        |key: &str, words: &str, unit: &str| schema.get(key).map(|value| format!("{words} {value}{unit}"));
    // Zero is no bound of what cannot be negative.
    let minimum = bound("minimum", "at least", "").filter(|words| words != "at least 0");
    let filled = ["minItems", "minLength"].iter().any(|key| schema.get(key) == Some(&Value::from(1)));
    let all = [
        minimum,
        bound("maximum", "at most", ""),
        filled.then(|| "not empty".to_owned()),
        bound("maxItems", "at most", " entries"),
    ];
    all.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// The rows of an object's keys and, below each, those of what it holds.
fn rows(root: &Value, schema: &Value, path: &str, out: &mut String) {
    let none = Map::new();
    let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&none);
    let required = schema.get("required").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    for (name, property) in properties {
        let found = resolved(root, property);
        let default = match property.get("default").or_else(|| found.get("default")) {
            _ if required.iter().any(|required| required == name) => "required".to_owned(),
            Some(default @ (Value::Number(_) | Value::Bool(_))) => format!("`{default}`"),
            Some(Value::String(default)) => format!("`{default}`"),
            _ => String::new(),
        };
        let description = property.get("description").or_else(|| found.get("description"));
        let description = description.and_then(Value::as_str).unwrap_or_default().replace('\n', " ");
        assert!(!description.is_empty(), "{path}{name} has no comment");
        let _ = writeln!(
            out,
            "| `{path}{name}` | {} | {default} | {} | {description} |",
            kind(root, property),
            bounds(property)
        );
        let items = found.get("items").map(|items| resolved(root, items));
        match items {
            Some(items) => rows(root, items, &format!("{path}{name}[]."), out),
            None => rows(root, found, &format!("{path}{name}."), out),
        }
    }
}

fn document() -> String {
    let root = schema();
    let mut table = String::new();
    rows(&root, &root, "", &mut table);
    format!(
        "# Configuration\n\n\
         <!-- Written by `cargo xtask docs` from agent/src/config; change it there. -->\n\n\
         One YAML file, which `weir-agent run --config FILE` reads when it starts and looks at every two seconds: \
         `enrolment`, `recording` (but for `encryption`) and, of each cluster, `authentication` and `roles` change while it \
         runs, all else takes a restart. A key that is not in the table below is refused, and so is a value out of its bounds; the message names the file, the key and the mend. The \
         file has at most {CONFIG_BYTES_MAX} bytes. `weir-agent doctor --config FILE` checks it and what it names. \
         `weir-agent exec --config FILE` takes node, tenant, journal and limits from it.\n\n\
         [configuration.schema.json](configuration.schema.json) is the same as a JSON schema, for editors.\n\n\
         ## A complete example\n\n```yaml\n{EXAMPLE}```\n\n\
         ## Keys\n\n\
         `[]` stands for each entry of a list. Sizes are in bytes, times in seconds, as the names say. What is \
         neither required nor has a default may be left out.\n\n\
         | key | type | default | bounds | meaning |\n|---|---|---|---|---|\n{table}"
    )
}

#[test]
fn the_documentation_is_what_the_types_say() {
    let written = |schema: &Value| format!("{:#}\n", schema);
    expect_file!["../../../docs/configuration.schema.json"].assert_eq(&written(&schema()));
    expect_file!["../../../deploy/helm/weir/values.schema.json"].assert_eq(&written(&chart_schema(schema())));
    expect_file!["../../../docs/configuration.md"].assert_eq(&document());
}

#[test]
fn the_example_is_valid_and_complete() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut example = EXAMPLE.to_owned();
    for name in [
        "staging.kubeconfig",
        "staging-ca.crt",
        "weir-ca.crt",
        "weir-ca.key",
        "clients-ca.crt",
        "kafka-password",
        "collector-ca.crt",
    ] {
        let file = folder.path().join(name);
        std::fs::write(&file, "").expect("can be written");
        let named = format!("/etc/weir/{name}");
        assert!(example.contains(&named), "{named} is not in the example");
        example = example.replace(&named, &file.display().to_string());
    }
    Config::parse("example.yaml".as_ref(), &example, "node").expect("is valid");
    let mut keys = String::new();
    let root = schema();
    rows(&root, &root, "", &mut keys);
    for path in keys.lines().filter_map(|row| row.split('`').nth(1)) {
        let key = path.rsplit('.').next().unwrap_or(path);
        assert!(EXAMPLE.contains(&format!("{key}:")), "{path} is not in the example");
    }
}
