//! Whether an agent is alive on this node, and what it says of itself, for `weir-agent status`. How it is asked is in
//! [`super::handover`].

use std::fmt;

use serde::Serialize;

/// Whether an agent is alive on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "state")]
pub enum Presence {
    /// It answers.
    Running {
        /// Its process.
        pid: u32,
        /// Its version.
        version: String,
        /// Why its configuration file, as it is now, is not in force.
        #[serde(skip_serializing_if = "Option::is_none")]
        configuration_problem: Option<String>,
        /// What of its journal is not in Kafka yet, if that is late, and why.
        #[serde(skip_serializing_if = "Option::is_none")]
        unpublished: Option<String>,
        /// Whether it intercepts and records as it should.
        ready: bool,
        /// Whether containers wait until their pod is enrolled: the container runtime asks before it starts one.
        containers_wait: bool,
        /// Why they do not; an agent of an earlier version does not say.
        #[serde(rename = "containersWaitProblem", skip_serializing_if = "Option::is_none")]
        no_wait: Option<String>,
    },
    /// It is there and does not answer: stopped, stuck, just handing over, or of another version.
    Silent,
    /// None, or one that has not enrolled the pods it found yet.
    Absent,
}

impl fmt::Display for Presence {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running {
                pid,
                version,
                configuration_problem,
                unpublished,
                ready,
                containers_wait,
                no_wait,
            } => {
                write!(formatter, "running, pid {pid}, version {version}")?;
                let mut more = |text: fmt::Arguments<'_>| write!(formatter, "\n                {text}");
                if !ready {
                    more(format_args!("not ready: its log and /readyz say why"))?;
                }
                if let Some(problem) = configuration_problem {
                    more(format_args!("its configuration was changed and refused: {problem}"))?;
                }
                if let Some(unpublished) = unpublished {
                    more(format_args!("{unpublished}"))?;
                }
                match (containers_wait, no_wait) {
                    (true, _) => more(format_args!(
                        "containers wait until their pod is enrolled: the container runtime asks before it starts one (NRI)"
                    )),
                    (false, Some(reason)) => more(format_args!(
                        "containers do not wait until their pod is enrolled, and may be refused at first: {reason}"
                    )),
                    (false, None) => more(format_args!(
                        "it does not say whether containers wait until their pod is enrolled"
                    )),
                }
            }
            Self::Silent => {
                formatter.write_str("there, and does not answer; is it stopped, stuck, or just handing over?")
            }
            Self::Absent => formatter.write_str(
                "none that has enrolled its pods; those that are enrolled are denied the API until one has",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::Presence;

    #[track_caller]
    fn check(containers_wait: bool, no_wait: Option<&str>, text: &Expect, json: &Expect) {
        let presence = Presence::Running {
            pid: 7,
            version: "1.2.3".to_owned(),
            configuration_problem: Some("clusters[0].roles: say one".to_owned()),
            unpublished: None,
            ready: false,
            containers_wait,
            no_wait: no_wait.map(str::to_owned),
        };
        text.assert_eq(&presence.to_string());
        json.assert_eq(&serde_json::to_string(&presence).expect("serialises"));
    }

    #[test]
    fn an_agent_says_whether_containers_wait_and_why_not() {
        check(
            true,
            None,
            &expect![[r#"
            running, pid 7, version 1.2.3
                            not ready: its log and /readyz say why
                            its configuration was changed and refused: clusters[0].roles: say one
                            containers wait until their pod is enrolled: the container runtime asks before it starts one (NRI)"#]],
            &expect![[
                r#"{"state":"running","pid":7,"version":"1.2.3","configurationProblem":"clusters[0].roles: say one","ready":false,"containersWait":true}"#
            ]],
        );
        check(
            false,
            Some("`nri.enabled` is false"),
            &expect![[r#"
            running, pid 7, version 1.2.3
                            not ready: its log and /readyz say why
                            its configuration was changed and refused: clusters[0].roles: say one
                            containers do not wait until their pod is enrolled, and may be refused at first: `nri.enabled` is false"#]],
            &expect![[
                r#"{"state":"running","pid":7,"version":"1.2.3","configurationProblem":"clusters[0].roles: say one","ready":false,"containersWait":false,"containersWaitProblem":"`nri.enabled` is false"}"#
            ]],
        );
        check(
            false,
            None,
            &expect![[r#"
            running, pid 7, version 1.2.3
                            not ready: its log and /readyz say why
                            its configuration was changed and refused: clusters[0].roles: say one
                            it does not say whether containers wait until their pod is enrolled"#]],
            &expect![[
                r#"{"state":"running","pid":7,"version":"1.2.3","configurationProblem":"clusters[0].roles: say one","ready":false,"containersWait":false}"#
            ]],
        );
    }
}
