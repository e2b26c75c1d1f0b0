//! The interception on the running kernel: cgroups, network namespaces and pins of their own, the programs attached
//! to those cgroups only. Needs root and the built programs: without them it fails under CI=true, and elsewhere
//! says loudly that nothing was tested. Everything made here is removed by drop guards.
#![expect(clippy::unwrap_used, reason = "what fails here fails the test, with its place")]

mod canary;
mod cold_start;
mod coverage;
mod enrolment;
mod full;
mod guards;
mod interfaces;
mod pins;
mod programs;
mod scale;
mod sieve;
mod told;
mod world;
