//! What the selected pods of this node could do past Weir, and what closes it.

use std::collections::{BTreeSet, HashMap};

use tokio::sync::watch;

use super::{Check, Need};
use crate::{
    config::Config,
    interception::{
        account_rights::{ACCOUNTS_MAX, Account, NAMESPACES_MAX, Rights},
        cluster_access::ClusterAccess,
        cluster_watch::ClusterWatch,
        pod::PodUid,
        powers::{Selected, selected, unguarded},
    },
};

/// Most pods that are named; of the rest only the number is said.
const NAMED_MAX: usize = 10;
/// What such a pod could do, whoever it is, and what prevents it.
const CLOSES: &str = "such a pod can, as root of the node: detach the programs (the agent attaches them again within a second and \
                      records it), write the kernel maps, throw the emergency switch where the configuration allows one, read the agent's memory and journal, take the credentials of the kubelet or \
                      of other pods, and on the host's network send frames past the guards. Keep them out: label enrolled namespaces \
                      pod-security.kubernetes.io/enforce=baseline, give their service accounts no rights of their own (then what goes \
                      past Weir is refused by the API server), and see what the check security hooks says";

/// What a service account's own rights are good for, and what takes them.
const MEND_OF_RIGHTS: &str = "whoever has its token can use them from where no Weir is, and a pod that got past Weir could here: take its RoleBindings \
                              and ClusterRoleBindings away (`kubectl auth can-i --list --as=system:serviceaccount:NAMESPACE:NAME -n NAMESPACE` shows all that \
                              it holds), and let clusters[].roles say who goes on as whom";

/// Those of the node's own cluster, which is the first.
pub async fn checks(config: &Config) -> Vec<Check> {
    let Some(cluster) = config.clusters.first() else { return Vec::new() };
    let authority = cluster.certificate_authority.as_deref();
    // That it cannot be used is said by the cluster's own check.
    let Ok(access) = ClusterAccess::load(&cluster.name, &cluster.access, authority).await else {
        return Vec::new();
    };
    let watch = ClusterWatch {
        client: access.client.clone(),
        node: config.node.clone(),
        enrolment: watch::channel(config.enrolment.clone().into()).1,
        intent_annotations: Vec::new(),
    };
    let name = "selected pods";
    let selected = match selected(&watch).await {
        Ok(selected) => selected,
        Err(problem) => {
            let mend = "is the API server up, and may the agent's service account list pods and namespaces?";
            return vec![Check::bad(name, Need::Must, problem, mend)];
        }
    };
    vec![powers_of(&selected), interfaces_of(&selected), accounts_of(&access, &selected).await]
}

fn powers_of(selected: &HashMap<PodUid, Selected>) -> Check {
    let powerful = selected.values().filter(|pod| !pod.powers.is_empty());
    let powerful = powerful.map(|pod| {
        let powers: Vec<_> = pod.powers.iter().map(String::as_str).collect();
        format!("{} ({})", pod.name, powers.join(", "))
    });
    let (name, count) = ("selected pods", selected.len());
    Check {
        mend: Some(CLOSES.to_owned()),
        ..match listed(powerful.collect()) {
            None => Check::good(
                name,
                Need::Should,
                format!("none of {count} is privileged or reaches into the node"),
            ),
            Some(named) => {
                Check::bad(name, Need::Should, format!("privileged, or reaching into the node: {named}"), "")
            }
        }
    }
}

fn interfaces_of(selected: &HashMap<PodUid, Selected>) -> Check {
    let (name, count) = ("selected pods' interfaces", selected.len());
    match unguarded(selected) {
        Err(error) => Check::bad(
            name,
            Need::Should,
            format!("cannot be read: {error}"),
            "run as root in the host's network and pid namespaces",
        ),
        Ok(found) => {
            let named =
                found.into_iter().map(|(pod, names)| format!("{pod} ({})", names.join(", "))).collect();
            match listed(named) {
                None => Check::good(
                    name,
                    Need::Should,
                    format!("all of {count} pods end on this node, where guards stand"),
                ),
                Some(named) => Check::bad(
                    name,
                    Need::Should,
                    format!("without an end on this node: {named}"),
                    "no guard can stand there: a process with NET_RAW could send frames past Weir; drop that capability, or use a \
                     bridge, ptp or VPC CNI network instead of ipvlan, macvlan or a device of its own",
                ),
            }
        }
    }
}

/// Whether their service accounts hold rights: advice, since without rules it is by them that pods work.
async fn accounts_of(access: &ClusterAccess, selected: &HashMap<PodUid, Selected>) -> Check {
    let name = "selected pods' rights";
    let accounts: BTreeSet<Account> = selected.values().filter_map(|pod| pod.account.clone()).collect();
    match Rights::of(&access.client, &accounts).await {
        Err(problem) => {
            let mend = "may the agent's ClusterRole create subjectaccessreviews (authorization.k8s.io), and does every binding name a role that is there?";
            Check::bad(name, Need::Should, format!("cannot be asked for: {problem}"), mend)
        }
        Ok(rights) => {
            let left_out = left_out(&rights, accounts.len());
            match listed(rights.holders.clone()) {
                None => {
                    let ((all, each), places) = (Rights::ASKED, rights.namespaces);
                    let found = format!(
                        "none of {} service accounts holds any of {all} rights, of which {each} were asked for in each of {places} namespaces (rights to \
                         objects by their names are not seen){left_out}",
                        rights.accounts
                    );
                    // What was not asked for is not known to be none.
                    if left_out.is_empty() {
                        Check::good(name, Need::Should, found)
                    } else {
                        Check::bad(name, Need::Should, found, MEND_OF_RIGHTS)
                    }
                }
                Some(named) => {
                    let found = format!("service accounts with rights of their own: {named}{left_out}");
                    Check::bad(name, Need::Should, found, MEND_OF_RIGHTS)
                }
            }
        }
    }
}

/// What was not asked for, since there was too much.
fn left_out(rights: &Rights, accounts: usize) -> String {
    let mut text = String::new();
    if accounts > rights.accounts {
        text += &format!("; not asked for: {} more accounts than {ACCOUNTS_MAX}", accounts - rights.accounts);
    }
    if rights.accounts > 0 && rights.namespaces_total > rights.namespaces {
        let more = rights.namespaces_total - rights.namespaces;
        text += &format!("; not asked in: {more} more namespaces than {NAMESPACES_MAX}");
    }
    text
}

/// Names in one line, sorted; none where there are none.
fn listed(mut names: Vec<String>) -> Option<String> {
    names.sort();
    let left = names.len().saturating_sub(NAMED_MAX);
    names.truncate(NAMED_MAX);
    let more = if left > 0 { format!(" and {left} more") } else { String::new() };
    (!names.is_empty()).then(|| format!("{}{more}", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::listed;

    #[test]
    fn a_long_list_is_cut_and_says_so() {
        assert_eq!(listed(Vec::new()), None);
        assert_eq!(listed(vec!["b".to_owned(), "a".to_owned()]).as_deref(), Some("a, b"));
        let many = listed((0..12).map(|number| format!("{number:02}")).collect());
        assert!(many.is_some_and(|text| text.starts_with("00, 01") && text.ends_with("09 and 2 more")));
    }
}
