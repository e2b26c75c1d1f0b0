//! `weir-agent exec`: one command under interception, no cluster install.

pub mod api_set;
pub mod cgroup;
pub mod child;
pub mod invoker;
pub mod kubeconfig;
mod kubeconfig_file;
pub mod proxy_environment;
pub mod signals;
pub mod upstream;
