//! `weir-agent exec`: one command under interception, no cluster install.
