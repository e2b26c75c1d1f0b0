//go:build tools

// Package components pins what is built, so that go.mod and go.sum cover every dependency.
package components

import _ "github.com/nsmithuk/local-kms"
