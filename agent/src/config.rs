//! The configuration file: raw (serde, unknown keys refused) → validated, once.
