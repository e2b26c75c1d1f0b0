//! What rights service accounts hold of their own, for `doctor`: a token used past Weir could do that much.
//!
//! The API server is asked (SubjectAccessReview) and not its RBAC objects read, so that whatever else authorises there answers too.
//! It knows no question for "anything at all"; so it is asked for what any role of use would give. Rights to objects by their names
//! (`resourceNames`) are not seen: nobody knows which to ask for.

use std::collections::BTreeSet;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::{
    authorization::v1::{
        ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec, SubjectAccessReviewStatus,
    },
    core::v1::Namespace,
};
use kube::{Api, Client, ResourceExt as _, api::ListParams};

use super::cluster_access::create;

/// Most accounts that are asked about.
pub const ACCOUNTS_MAX: usize = 8;
/// Most namespaces in which each account's rights are asked for, beside all at once; its own is the first.
pub const NAMESPACES_MAX: usize = 32;
/// Most rights that are named of one account.
const NAMED_MAX: usize = 3;
/// Questions under way at a time.
const CONCURRENT: usize = 8;

/// Verb, group, resource and subresource of what is in a namespace.
const IN_NAMESPACES: [(&str, &str, &str, &str); 29] = [
    ("get", "", "secrets", ""),
    ("list", "", "secrets", ""),
    ("create", "", "secrets", ""),
    ("update", "", "secrets", ""),
    ("patch", "", "secrets", ""),
    ("get", "", "configmaps", ""),
    ("update", "", "configmaps", ""),
    ("get", "", "pods", ""),
    ("list", "", "pods", ""),
    ("create", "", "pods", ""),
    ("delete", "", "pods", ""),
    ("get", "", "pods", "log"),
    ("create", "", "pods", "exec"),
    // Before Kubernetes 1.35 this is enough over WebSocket.
    ("get", "", "pods", "exec"),
    ("create", "", "pods", "attach"),
    ("get", "", "pods", "attach"),
    ("update", "", "pods", "ephemeralcontainers"),
    ("patch", "", "pods", "ephemeralcontainers"),
    ("create", "", "pods", "portforward"),
    ("get", "", "pods", "portforward"),
    ("get", "", "services", ""),
    ("create", "", "serviceaccounts", "token"),
    ("impersonate", "", "serviceaccounts", ""),
    ("get", "apps", "deployments", ""),
    ("patch", "apps", "deployments", ""),
    ("create", "batch", "jobs", ""),
    ("create", "rbac.authorization.k8s.io", "rolebindings", ""),
    // Roles with more than one holds oneself.
    ("bind", "rbac.authorization.k8s.io", "roles", ""),
    ("escalate", "rbac.authorization.k8s.io", "roles", ""),
];
/// And of what is in none.
const OF_THE_CLUSTER: [(&str, &str, &str, &str); 11] = [
    ("list", "", "namespaces", ""),
    // Whoever writes its labels takes a namespace out of enrolment.
    ("patch", "", "namespaces", ""),
    ("list", "", "nodes", ""),
    // A kubelet executes in pods for whoever may do this.
    ("get", "", "nodes", "proxy"),
    ("impersonate", "", "users", ""),
    ("impersonate", "", "groups", ""),
    ("create", "certificates.k8s.io", "certificatesigningrequests", ""),
    ("create", "rbac.authorization.k8s.io", "clusterrolebindings", ""),
    ("bind", "rbac.authorization.k8s.io", "clusterroles", ""),
    ("escalate", "rbac.authorization.k8s.io", "clusterroles", ""),
    ("patch", "admissionregistration.k8s.io", "validatingadmissionpolicies", ""),
];

/// A service account.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Account {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// What was asked, and what came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    /// How many accounts were asked about, the first of all.
    pub accounts: usize,
    /// In how many namespaces.
    pub namespaces: usize,
    /// How many namespaces there are.
    pub namespaces_total: usize,
    /// `NAMESPACE/NAME (RIGHT, …)` of those that hold some.
    pub holders: Vec<String>,
}

impl Rights {
    /// How many rights are asked for in all namespaces at once, and how many of those in each.
    pub const ASKED: (usize, usize) = (IN_NAMESPACES.len() + OF_THE_CLUSTER.len(), IN_NAMESPACES.len());

    /// Asks for the rights of these accounts.
    ///
    /// # Errors
    /// The API server does not say; in words.
    pub async fn of(client: &Client, accounts: &BTreeSet<Account>) -> Result<Self, String> {
        let namespaces = Api::<Namespace>::all(client.clone()).list(&ListParams::default()).await;
        let namespaces = namespaces.map_err(|error| error.to_string())?;
        let names: Vec<String> = namespaces.iter().map(|namespace| namespace.name_any()).collect();
        let mut rights = Self { namespaces_total: names.len(), ..Self::default() };
        for account in accounts.iter().take(ACCOUNTS_MAX) {
            let mut in_order = vec![account.namespace.clone()];
            in_order.extend(names.iter().filter(|name| **name != account.namespace).cloned());
            in_order.truncate(NAMESPACES_MAX);
            rights.accounts += 1;
            rights.namespaces = in_order.len();
            let held = of(client, account, &in_order).await?;
            if !held.is_empty() {
                let named = format!("{}/{} ({})", account.namespace, account.name, held.join(", "));
                rights.holders.push(named);
            }
        }
        Ok(rights)
    }
}

/// Some of what an account holds; what it holds in all namespaces is not asked for again in each.
async fn of(client: &Client, account: &Account, namespaces: &[String]) -> Result<Vec<String>, String> {
    let everywhere = OF_THE_CLUSTER.iter().chain(&IN_NAMESPACES).map(|right| (right, ""));
    let held = asked(client, account, everywhere.collect()).await?;
    if !held.is_empty() {
        return Ok(held);
    }
    let in_each =
        namespaces.iter().flat_map(|name| IN_NAMESPACES.iter().map(move |right| (right, name.as_str())));
    asked(client, account, in_each.collect()).await
}

/// A right, and the namespace that it is asked for in; none: all of them.
type Question<'a> = (&'a (&'static str, &'static str, &'static str, &'static str), &'a str);

async fn asked(
    client: &Client,
    account: &Account,
    questions: Vec<Question<'_>>,
) -> Result<Vec<String>, String> {
    let answers = stream::iter(questions).map(|question| async move {
        let reviewed = create(client, &review(account, question)).await?;
        let given = given(reviewed.status.unwrap_or_default())?;
        Ok::<_, String>(given.then(|| in_words(question)))
    });
    let held = answers.buffered(CONCURRENT).try_filter_map(|right| async move { Ok(right) });
    held.take(NAMED_MAX).try_collect().await
}

/// What could not be judged is not taken for "no".
fn given(status: SubjectAccessReviewStatus) -> Result<bool, String> {
    match (status.allowed, status.evaluation_error) {
        (true, _) => Ok(status.denied != Some(true)),
        (false, None) => Ok(false),
        (false, Some(error)) => Err(format!("the API server cannot judge: {error}")),
    }
}

fn review(
    account: &Account,
    ((verb, group, resource, subresource), namespace): Question<'_>,
) -> SubjectAccessReview {
    let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let groups = [
        "system:serviceaccounts".to_owned(),
        format!("system:serviceaccounts:{}", account.namespace),
        "system:authenticated".to_owned(),
    ];
    SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(format!("system:serviceaccount:{}:{}", account.namespace, account.name)),
            groups: Some(groups.into()),
            resource_attributes: Some(ResourceAttributes {
                verb: given(verb),
                group: given(group),
                resource: given(resource),
                subresource: given(subresource),
                namespace: given(namespace),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    }
}

fn in_words(((verb, _, resource, subresource), namespace): Question<'_>) -> String {
    let below = if subresource.is_empty() { String::new() } else { format!("/{subresource}") };
    let place = if namespace.is_empty() { "everywhere".to_owned() } else { format!("in {namespace}") };
    format!("{verb} {resource}{below} {place}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_api_server_cannot_judge_is_no_denial() {
        let status = |allowed, denied, error: Option<&str>| SubjectAccessReviewStatus {
            allowed,
            denied,
            evaluation_error: error.map(str::to_owned),
            reason: None,
        };
        assert_eq!(given(status(true, None, None)), Ok(true));
        assert_eq!(given(status(true, Some(true), None)), Ok(false));
        assert_eq!(given(status(false, None, None)), Ok(false));
        let unjudged = Err("the API server cannot judge: webhook away".to_owned());
        assert_eq!(given(status(false, None, Some("webhook away"))), unjudged);
    }

    #[test]
    fn a_question_is_asked_in_the_name_of_the_account_and_of_its_groups() {
        let account = Account { namespace: "ci".to_owned(), name: "runner".to_owned() };
        let question = (&("create", "", "pods", "exec"), "prod");
        let spec = review(&account, question).spec;
        assert_eq!(spec.user.as_deref(), Some("system:serviceaccount:ci:runner"));
        assert!(spec.groups.is_some_and(|groups| groups.contains(&"system:serviceaccounts:ci".to_owned())));
        let asked = spec.resource_attributes.expect("is given");
        assert_eq!(
            (asked.group, asked.subresource.as_deref(), asked.namespace.as_deref()),
            (None, Some("exec"), Some("prod"))
        );
        assert_eq!(in_words(question), "create pods/exec in prod");
        assert_eq!(in_words((&("list", "", "nodes", ""), "")), "list nodes everywhere");
    }
}
