//! The harness: the real components (etcd, Kubernetes control plane, kubelet, containerd) on this machine, and what
//! tests and `cargo xtask` need to drive them and to read what they wrote.
//!
//! Nothing here is a mock, and nothing here judges Weir: assertions live in the tests and in `xtask demo`. Every
//! wait is on a condition, with a deadline, through [`wait`].

pub mod agent;
pub mod audit;
pub mod aws;
pub mod certificates;
pub mod clients;
pub mod clock;
pub mod command;
pub mod components;
pub mod coverage;
pub mod identity_provider;
pub mod image;
pub mod kafka;
pub mod key_service;
mod maven;
pub mod nri;
pub mod opensearch;
pub mod otel_collector;
pub mod packages;
pub mod pods;
pub mod process;
pub mod progress;
pub mod python;
pub mod testbed;
pub mod wait;

pub use agent::AgentProcess;
pub use aws::AwsRig;
pub use clients::Clients;
pub use clock::ShiftedClock;
pub use coverage::Coverage;
pub use identity_provider::IdentityProvider;
pub use kafka::Kafka;
pub use key_service::KeyService;
pub use opensearch::{OpenSearch, Rsyslog};
pub use otel_collector::OtelCollector;
pub use pods::{Folder, Pod, PodSpec};
pub use testbed::Testbed;
pub use wait::wait_until;
