//! The node agent: see ARCHITECTURE.md for the way of one connection.
