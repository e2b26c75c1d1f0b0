//! `weir-agent doctor`: what this node can and cannot do, each with the mend.
