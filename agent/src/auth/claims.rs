//! From verified claims to a user, by the mappings and rules of the configuration. They mean what they mean in
//! Kubernetes (k8s.io/apiserver `plugin/pkg/authenticator/token/oidc`). Sans-IO.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::{Map, Value as Json};
use weir_common::event::UserInfo;

use super::{
    expression::{Expression, ExpressionError, Value, Variables},
    rule::user_value,
};

/// The variable of expressions over claims.
pub const CLAIMS: &str = "claims";
/// The variable of expressions over the user.
pub const USER: &str = "user";
/// Where Kubernetes has the id of a token among a user's extra values.
pub const CREDENTIAL_ID: &str = "authentication.kubernetes.io/credential-id";
/// Most groups of a user.
pub const GROUPS_MAX: usize = 2048;

/// Where one string comes from.
#[derive(Clone, Debug)]
pub enum Mapping {
    /// A claim, with a prefix.
    Claim {
        /// Name of the claim.
        name: String,
        /// What is put in front.
        prefix: String,
    },
    /// The value of an expression over the claims.
    Expression(Arc<Expression>),
}

/// What must hold of claims.
#[derive(Clone, Debug)]
pub enum ClaimRule {
    /// A claim has this value.
    Required {
        /// Name of the claim.
        claim: String,
        /// Its value.
        value: String,
    },
    /// An expression over the claims is true.
    Condition(Condition),
}

/// An expression that must be true.
#[derive(Clone, Debug)]
pub struct Condition {
    /// The expression.
    pub expression: Arc<Expression>,
    /// What is said where it is not.
    pub message: Option<String>,
}

/// How users are made of claims.
#[derive(Clone, Debug)]
pub struct ClaimMappings {
    /// The name.
    pub username: Mapping,
    /// The groups, if there are any.
    pub groups: Option<Mapping>,
    /// The uid, if there is one.
    pub uid: Option<Mapping>,
    /// Keys and expressions of extra values.
    pub extra: Vec<(String, Arc<Expression>)>,
    /// What must hold of the claims.
    pub claim_rules: Vec<ClaimRule>,
    /// What must hold of the user.
    pub user_rules: Vec<Condition>,
}

/// Why claims make no user; for who presented them. Of the claims only names are repeated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimsError {
    /// The claims are too large to be read.
    #[error("its claims cannot be read: {0}")]
    Unreadable(ExpressionError),
    /// A claim is missing or of another type.
    #[error("its claim {claim:?} {problem}, and {what} needs it")]
    Claim {
        /// The claim.
        claim: String,
        /// What is wrong.
        problem: &'static str,
        /// What needs it.
        what: &'static str,
    },
    /// An expression has no value.
    #[error("{what}: {error}")]
    Expression {
        /// Which.
        what: String,
        /// Why.
        error: ExpressionError,
    },
    /// A name that says nothing.
    #[error("its claims give an empty user name")]
    EmptyUsername,
    /// More than [`GROUPS_MAX`].
    #[error("its claims give {groups} groups, more than {GROUPS_MAX}")]
    TooManyGroups {
        /// How many.
        groups: usize,
    },
    /// The issuer itself says that the email address may be anybody's.
    #[error("its claim \"email_verified\" is not true, so the email address may be somebody else's")]
    EmailNotVerified,
    /// A rule does not hold.
    #[error("{0}")]
    Rule(String),
}

impl ClaimMappings {
    /// The user that `claims` are of, and the claims as expressions read them.
    ///
    /// # Errors
    /// [`ClaimsError`]: a mapping has no value, or a rule does not hold.
    pub fn user(&self, claims: &Map<String, Json>) -> Result<(UserInfo, Value), ClaimsError> {
        let json = Json::Object(claims.clone());
        let value = Value::from_json(&json).map_err(ClaimsError::Unreadable)?;
        let variables = Variables::new().with(CLAIMS, &value);
        let username = self.username(claims, &variables)?;
        let groups = match &self.groups {
            None => Vec::new(),
            Some(Mapping::Claim { name, prefix }) => {
                claim_strings(claims, name)?.into_iter().map(|group| format!("{prefix}{group}")).collect()
            }
            Some(Mapping::Expression(expression)) => strings(expression, &variables, "claimMappings.groups")?,
        };
        if groups.len() > GROUPS_MAX {
            return Err(ClaimsError::TooManyGroups { groups: groups.len() });
        }
        let uid = match &self.uid {
            None => String::new(),
            Some(Mapping::Claim { name, prefix }) => {
                format!("{prefix}{}", claim_string(claims, name, "claimMappings.uid")?)
            }
            Some(Mapping::Expression(expression)) => {
                expression.string(&variables).map_err(failed("claimMappings.uid"))?
            }
        };
        let mut extra = BTreeMap::new();
        if let Some(Json::String(id)) = claims.get("jti").filter(|id| *id != "") {
            extra.insert(CREDENTIAL_ID.to_owned(), vec![format!("JTI={id}")]);
        }
        for (key, expression) in &self.extra {
            let values = strings(expression, &variables, &format!("claimMappings.extra {key:?}"))?;
            if !values.is_empty() {
                extra.insert(key.clone(), values);
            }
        }
        let user = UserInfo { username, uid, groups, extra };
        self.claim_rules(claims, &variables)?;
        self.user_rules(&user)?;
        Ok((user, value))
    }

    fn username(&self, claims: &Map<String, Json>, variables: &Variables<'_>) -> Result<String, ClaimsError> {
        const WHAT: &str = "claimMappings.username";
        let (username, prefix) = match &self.username {
            Mapping::Expression(expression) => (expression.string(variables).map_err(failed(WHAT))?, ""),
            Mapping::Claim { name, prefix } => {
                if name == "email" && claims.get("email_verified").is_some_and(|verified| *verified != true) {
                    return Err(ClaimsError::EmailNotVerified);
                }
                (claim_string(claims, name, WHAT)?, prefix.as_str())
            }
        };
        // Kubernetes lets a claim be empty, and all who have it empty be one user.
        if username.is_empty() {
            return Err(ClaimsError::EmptyUsername);
        }
        Ok(format!("{prefix}{username}"))
    }

    fn claim_rules(&self, claims: &Map<String, Json>, variables: &Variables<'_>) -> Result<(), ClaimsError> {
        for rule in &self.claim_rules {
            match rule {
                ClaimRule::Required { claim, value } => {
                    if claim_string(claims, claim, "claimValidationRules")? != *value {
                        let problem = format!("its claim {claim:?} has another value than the required one");
                        return Err(ClaimsError::Rule(problem));
                    }
                }
                ClaimRule::Condition(condition) => condition.holds(variables, "claimValidationRules")?,
            }
        }
        Ok(())
    }

    fn user_rules(&self, user: &UserInfo) -> Result<(), ClaimsError> {
        if self.user_rules.is_empty() {
            return Ok(());
        }
        let value = user_value(user).map_err(ClaimsError::Unreadable)?;
        let variables = Variables::new().with(USER, &value);
        self.user_rules.iter().try_for_each(|rule| rule.holds(&variables, "userValidationRules"))
    }
}

impl Condition {
    fn holds(&self, variables: &Variables<'_>, what: &str) -> Result<(), ClaimsError> {
        if self.expression.boolean(variables).map_err(failed(what))? {
            return Ok(());
        }
        Err(ClaimsError::Rule(
            self.message
                .clone()
                .unwrap_or_else(|| format!("{what}: it does not hold that {}", self.expression.source())),
        ))
    }
}

fn failed(what: &str) -> impl FnOnce(ExpressionError) -> ClaimsError {
    let what = what.to_owned();
    move |error| ClaimsError::Expression { what, error }
}

fn claim_string(claims: &Map<String, Json>, claim: &str, what: &'static str) -> Result<String, ClaimsError> {
    let wrong = |problem| Err(ClaimsError::Claim { claim: claim.to_owned(), problem, what });
    match claims.get(claim) {
        Some(Json::String(value)) => Ok(value.clone()),
        Some(_) => wrong("is no string"),
        None => wrong("is missing"),
    }
}

/// Groups may be missing.
fn claim_strings(claims: &Map<String, Json>, claim: &str) -> Result<Vec<String>, ClaimsError> {
    let wrong = || ClaimsError::Claim {
        claim: claim.to_owned(),
        problem: "is neither a string nor a list of strings",
        what: "claimMappings.groups",
    };
    match claims.get(claim) {
        None => Ok(Vec::new()),
        Some(Json::String(value)) => Ok(vec![value.clone()]),
        Some(Json::Array(items)) => {
            items.iter().map(|item| item.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
        }
        Some(_) => Err(wrong()),
    }
}

/// As Kubernetes has it: what is empty is not there.
fn strings(
    expression: &Expression,
    variables: &Variables<'_>,
    what: &str,
) -> Result<Vec<String>, ClaimsError> {
    let mut strings = expression.strings(variables).map_err(failed(what))?;
    strings.retain(|string| !string.is_empty());
    Ok(strings)
}
