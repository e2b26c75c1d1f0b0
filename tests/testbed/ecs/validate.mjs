// Validates ECS documents, one JSON object a line, against the fields that Elastic publishes for ECS 8.11:
//
//     npm ci && node validate.mjs FILE
//
// Every field must be one of them, of its type and among its allowed values; `kubernetes` and `weir` are not ECS'. Types must be expected
// with one of the categories.
import { readFileSync } from "node:fs";
import { EcsFlat } from "@elastic/ecs";

const OTHERS = ["kubernetes", "weir"];
const NUMBERS = ["long", "integer", "float", "scaled_float", "unsigned_long"];
const LISTS = "array";

const fail = (line, text) => {
  console.error(`line ${line}: ${text}`);
  process.exit(1);
};

const leaf = (line, name, value) => {
  const field = EcsFlat[name];
  if (!field) fail(line, `${name} is no field`);
  const values = Array.isArray(value) ? value : [value];
  if (Array.isArray(value) && !(field.normalize ?? []).includes(LISTS)) fail(line, `${name} is no list`);
  for (const each of values) {
    const numeric = NUMBERS.includes(field.type);
    if (numeric ? !Number.isSafeInteger(each) : typeof each !== "string") fail(line, `${name} is ${typeof each}`);
    if (field.type === "date" && Number.isNaN(Date.parse(each))) fail(line, `${name} is no date`);
    const allowed = (field.allowed_values ?? []).map((value) => value.name);
    if (allowed.length > 0 && !allowed.includes(each)) fail(line, `${name} may not be ${each}`);
  }
};

const walk = (line, prefix, value) => {
  for (const [name, inner] of Object.entries(value)) {
    const path = prefix + name;
    if (prefix === "" && OTHERS.includes(name)) continue;
    if (inner !== null && typeof inner === "object" && !Array.isArray(inner)) walk(line, `${path}.`, inner);
    else leaf(line, path, inner);
  }
};

const documents = readFileSync(process.argv[2], "utf8").trimEnd().split("\n");
documents.forEach((text, index) => {
  const document = JSON.parse(text);
  walk(index + 1, "", document);
  for (const name of ["@timestamp", "ecs", "message"]) if (!(name in document)) fail(index + 1, `no ${name}`);
  const categories = EcsFlat["event.category"].allowed_values;
  const expected = (document.event.category ?? []).flatMap(
    (name) => categories.find((category) => category.name === name).expected_event_types ?? [],
  );
  for (const type of document.event.type ?? []) {
    if (!expected.includes(type)) fail(index + 1, `type ${type} does not go with ${document.event.category}`);
  }
});
console.log(`${documents.length} documents`);
