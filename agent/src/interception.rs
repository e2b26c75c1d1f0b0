//! From the kernel's hooks to an accepted connection whose caller is known.
