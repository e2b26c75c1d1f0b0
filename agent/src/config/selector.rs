//! Label selectors in the shape and meaning of Kubernetes' `LabelSelector` (k8s.io/apimachinery
//! `pkg/apis/meta/v1`): every requirement must hold, and an empty selector selects everything.

use std::collections::BTreeMap;

use serde::Deserialize;

/// A label selector.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct LabelSelector {
    /// Labels that must be there with these values.
    #[serde(default)]
    pub match_labels: BTreeMap<String, String>,
    /// Further requirements.
    #[serde(default)]
    pub match_expressions: Vec<Requirement>,
}

/// A requirement on one label.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Requirement {
    /// The label.
    pub key: String,
    /// What must hold.
    pub operator: Operator,
    /// Values, for `In` and `NotIn`.
    #[serde(default)]
    pub values: Vec<String>,
}

/// The operators of Kubernetes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum Operator {
    /// The label is there, with one of the values.
    In,
    /// The label is absent or has none of the values.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is absent.
    DoesNotExist,
}

impl LabelSelector {
    /// Whether an object with these labels is selected.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self
                .match_expressions
                .iter()
                .all(|requirement| requirement.matches(labels.get(&requirement.key)))
    }

    /// The first requirement that Kubernetes would refuse: path within the selector, and why.
    pub(super) fn problem(&self) -> Option<(String, &'static str)> {
        self.match_expressions.iter().enumerate().find_map(|(index, requirement)| {
            let needs_values = matches!(requirement.operator, Operator::In | Operator::NotIn);
            let problem = match (needs_values, requirement.values.is_empty()) {
                (true, true) => "must not be empty for In and NotIn",
                (false, false) => "must be empty for Exists and DoesNotExist",
                _ => return None,
            };
            Some((format!("matchExpressions[{index}].values"), problem))
        })
    }
}

impl Requirement {
    fn matches(&self, value: Option<&String>) -> bool {
        match self.operator {
            Operator::In => value.is_some_and(|value| self.values.contains(value)),
            Operator::NotIn => value.is_none_or(|value| !self.values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::LabelSelector;

    #[track_caller]
    fn check(selector: &str, labels: &[(&str, &str)], expected: bool) {
        let selector: LabelSelector = serde_yaml_ng::from_str(selector).expect("parses");
        let labels: BTreeMap<_, _> =
            labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        assert_eq!(selector.matches(&labels), expected, "{selector:?} on {labels:?}");
    }

    #[test]
    fn selectors_mean_what_they_mean_in_kubernetes() {
        check("{}", &[], true);
        check("{matchLabels: {a: b}}", &[("a", "b"), ("c", "d")], true);
        check("{matchLabels: {a: b}}", &[("a", "c")], false);
        check("{matchExpressions: [{key: a, operator: In, values: [b, c]}]}", &[("a", "c")], true);
        check("{matchExpressions: [{key: a, operator: In, values: [b]}]}", &[], false);
        check("{matchExpressions: [{key: a, operator: NotIn, values: [b]}]}", &[], true);
        check("{matchExpressions: [{key: a, operator: NotIn, values: [b]}]}", &[("a", "b")], false);
        check("{matchExpressions: [{key: a, operator: Exists}]}", &[("a", "")], true);
        check("{matchExpressions: [{key: a, operator: DoesNotExist}]}", &[("a", "")], false);
    }
}
