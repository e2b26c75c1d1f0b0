//! Fields of Kubernetes' types in protobuf, as far as masks need them. The numbers are those of `generated.proto`.

use super::body::Sensitivity;

/// What is recorded of a field.
#[derive(Clone, Copy)]
pub(super) enum Rule {
    /// It, as it is.
    Keep,
    /// Its mask.
    Mask,
    /// A map from names to secrets.
    MaskedMap,
    /// `ObjectMeta`.
    Metadata,
    /// What is recorded of a message.
    Message(&'static Schema),
    /// `RawExtension`: an object in an envelope of its own.
    Object,
    /// `EnvVar`, whose value is masked by its name.
    Variable,
    /// Words that may quote a value.
    Words,
    /// The path of a field, in which values may be keys.
    FieldPath,
    /// A map of this name, whose values are masked where a rule is for them.
    NamedMap(&'static str),
}

/// What is recorded of fields that a schema does not name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Others {
    Keep,
    /// They are kept where nothing in them looks like an object with secrets.
    Inspect,
    /// Nothing: they are as good as masked.
    Drop,
}

/// What is recorded of a message.
pub(super) struct Schema {
    pub(super) fields: &'static [(u32, Rule)],
    pub(super) others: Others,
}

const fn schema(others: Others, fields: &'static [(u32, Rule)]) -> Schema {
    Schema { fields, others }
}

static SECRET: Schema = schema(
    Others::Drop,
    &[(1, Rule::Metadata), (2, Rule::MaskedMap), (3, Rule::Keep), (4, Rule::MaskedMap), (5, Rule::Keep)],
);
static SECRET_LIST: Schema = schema(Others::Drop, &[(1, Rule::Keep), (2, Rule::Message(&SECRET))]);
static TOKEN: Schema = schema(Others::Drop, &[(1, Rule::Mask), (2, Rule::Keep)]);
static TOKEN_REQUEST: Schema =
    schema(Others::Drop, &[(1, Rule::Metadata), (2, Rule::Keep), (3, Rule::Message(&TOKEN))]);
static TOKEN_REVIEW: Schema =
    schema(Others::Drop, &[(1, Rule::Metadata), (2, Rule::Message(&TOKEN)), (3, Rule::Keep)]);
static METADATA: Schema = schema(Others::Drop, &[(1, Rule::Metadata)]);
static METADATA_LIST: Schema = schema(Others::Drop, &[(1, Rule::Keep), (2, Rule::Message(&METADATA))]);
/// What a ConfigMap holds is recorded, also where it reads like a Secret, unless a rule masks it.
static CONFIG_MAP: Schema = schema(
    Others::Inspect,
    &[(1, Rule::Metadata), (2, Rule::NamedMap("data")), (3, Rule::NamedMap("binaryData")), (4, Rule::Keep)],
);
static CONFIG_MAP_LIST: Schema = schema(Others::Inspect, &[(1, Rule::Keep), (2, Rule::Message(&CONFIG_MAP))]);
static ANYTHING: Schema = schema(Others::Inspect, &[(1, Rule::Metadata)]);
static ANYTHING_LIST: Schema = schema(Others::Inspect, &[(1, Rule::Keep), (2, Rule::Message(&ANYTHING))]);
/// `v1` `List`, of objects of any kind.
static LIST: Schema = schema(Others::Drop, &[(1, Rule::Keep), (2, Rule::Object)]);
pub(super) static WATCH_EVENT: Schema = schema(Others::Drop, &[(1, Rule::Keep), (2, Rule::Object)]);
/// Has neither metadata of an object nor secrets.
static PLAIN: Schema = schema(Others::Keep, &[]);

static CAUSE: Schema = schema(Others::Keep, &[(2, Rule::Words), (3, Rule::FieldPath)]);
static DETAILS: Schema = schema(Others::Keep, &[(4, Rule::Message(&CAUSE))]);
static STATUS: Schema = schema(Others::Keep, &[(3, Rule::Words), (5, Rule::Message(&DETAILS))]);

/// `ephemeralContainers` have the fields of a container one level deeper.
static CONTAINER: Schema = schema(Others::Inspect, &[(7, Rule::Variable)]);
static EPHEMERAL_CONTAINER: Schema = schema(Others::Inspect, &[(1, Rule::Message(&CONTAINER))]);
static POD_SPEC: Schema = schema(
    Others::Inspect,
    &[
        (2, Rule::Message(&CONTAINER)),
        (20, Rule::Message(&CONTAINER)),
        (34, Rule::Message(&EPHEMERAL_CONTAINER)),
    ],
);
static POD: Schema = schema(Others::Inspect, &[(1, Rule::Metadata), (2, Rule::Message(&POD_SPEC))]);
static POD_LIST: Schema = schema(Others::Inspect, &[(1, Rule::Keep), (2, Rule::Message(&POD))]);
/// `PodTemplateSpec`. Its metadata names no object.
static TEMPLATE: Schema = schema(Others::Inspect, &[(2, Rule::Message(&POD_SPEC))]);
static POD_TEMPLATE: Schema = schema(Others::Inspect, &[(1, Rule::Metadata), (2, Rule::Message(&TEMPLATE))]);
static POD_TEMPLATE_LIST: Schema =
    schema(Others::Inspect, &[(1, Rule::Keep), (2, Rule::Message(&POD_TEMPLATE))]);
static WORKLOAD_SPEC: Schema = schema(Others::Inspect, &[(3, Rule::Message(&TEMPLATE))]);
static WORKLOAD: Schema = schema(Others::Inspect, &[(1, Rule::Metadata), (2, Rule::Message(&WORKLOAD_SPEC))]);
static WORKLOAD_LIST: Schema = schema(Others::Inspect, &[(1, Rule::Keep), (2, Rule::Message(&WORKLOAD))]);
static DAEMON_SET_SPEC: Schema = schema(Others::Inspect, &[(2, Rule::Message(&TEMPLATE))]);
static DAEMON_SET: Schema =
    schema(Others::Inspect, &[(1, Rule::Metadata), (2, Rule::Message(&DAEMON_SET_SPEC))]);
static DAEMON_SET_LIST: Schema = schema(Others::Inspect, &[(1, Rule::Keep), (2, Rule::Message(&DAEMON_SET))]);
static JOB_SPEC: Schema = schema(Others::Inspect, &[(6, Rule::Message(&TEMPLATE))]);
static JOB: Schema = schema(Others::Inspect, &[(1, Rule::Metadata), (2, Rule::Message(&JOB_SPEC))]);
static JOB_LIST: Schema = schema(Others::Inspect, &[(1, Rule::Keep), (2, Rule::Message(&JOB))]);
static JOB_TEMPLATE: Schema = schema(Others::Inspect, &[(2, Rule::Message(&JOB_SPEC))]);
static CRON_JOB_SPEC: Schema = schema(Others::Inspect, &[(5, Rule::Message(&JOB_TEMPLATE))]);
static CRON_JOB: Schema = schema(Others::Inspect, &[(1, Rule::Metadata), (2, Rule::Message(&CRON_JOB_SPEC))]);
static CRON_JOB_LIST: Schema = schema(Others::Inspect, &[(1, Rule::Keep), (2, Rule::Message(&CRON_JOB))]);
/// Holds a pod template in JSON.
static REVISION: Schema = schema(Others::Inspect, &[(1, Rule::Metadata), (2, Rule::Object)]);
static REVISION_LIST: Schema = schema(Others::Inspect, &[(1, Rule::Keep), (2, Rule::Message(&REVISION))]);

/// How objects with pods in them are recorded.
fn with_pods(kind: &str) -> Option<&'static Schema> {
    Some(match kind {
        "Pod" => &POD,
        "PodList" => &POD_LIST,
        "PodTemplate" => &POD_TEMPLATE,
        "PodTemplateList" => &POD_TEMPLATE_LIST,
        "Deployment" | "ReplicaSet" | "StatefulSet" | "ReplicationController" => &WORKLOAD,
        "DeploymentList" | "ReplicaSetList" | "StatefulSetList" | "ReplicationControllerList" => {
            &WORKLOAD_LIST
        }
        "DaemonSet" => &DAEMON_SET,
        "DaemonSetList" => &DAEMON_SET_LIST,
        "Job" => &JOB,
        "JobList" => &JOB_LIST,
        "CronJob" => &CRON_JOB,
        "CronJobList" => &CRON_JOB_LIST,
        "ControllerRevision" => &REVISION,
        "ControllerRevisionList" => &REVISION_LIST,
        _ => return None,
    })
}

/// Whether objects of this kind have environment variables.
pub(super) fn has_variables(kind: &str) -> bool {
    with_pods(kind).is_some()
}

/// Whether of objects of this kind all is known, but for their metadata, that a rule can be for.
pub(super) fn are_fields_known(kind: &str) -> bool {
    let is_known = matches!(
        kind,
        "ConfigMap" | "ConfigMapList" | "Secret" | "SecretList"
        // What is in it has kinds of its own; what is no object has nothing else.
        | "List" | "Status" | "PartialObjectMetadata" | "PartialObjectMetadataList"
    );
    is_known || kind.ends_with("Options")
}

/// How an object of this kind is recorded, and what it holds; `surroundings` is what the request is about. None: its fields are
/// not known, and it may hold secrets.
pub(super) fn schema_of(kind: &str, surroundings: Sensitivity) -> Option<(&'static Schema, Sensitivity)> {
    let none = surroundings == Sensitivity::None;
    let schema = match kind {
        "Secret" => return Some((&SECRET, Sensitivity::Secrets)),
        // Without a kind the server takes that of the request.
        "" if surroundings == Sensitivity::Secrets => &SECRET,
        "SecretList" => return Some((&SECRET_LIST, Sensitivity::Secrets)),
        "TokenRequest" => return Some((&TOKEN_REQUEST, Sensitivity::Tokens)),
        "TokenReview" => return Some((&TOKEN_REVIEW, Sensitivity::Tokens)),
        "PartialObjectMetadata" => &METADATA,
        "PartialObjectMetadataList" => &METADATA_LIST,
        "List" => &LIST,
        "Status" => &STATUS,
        options if options.ends_with("Options") => &PLAIN,
        _ if !none => return None,
        "ConfigMap" => &CONFIG_MAP,
        "ConfigMapList" => &CONFIG_MAP_LIST,
        "APIGroup" | "APIGroupList" | "APIResourceList" | "APIVersions" => &PLAIN,
        _ => match with_pods(kind) {
            Some(schema) => schema,
            None if kind.ends_with("List") => &ANYTHING_LIST,
            None => &ANYTHING,
        },
    };
    Some((schema, surroundings))
}
