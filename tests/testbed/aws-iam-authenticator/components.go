//go:build tools

// Package components pins what is built, so that go.mod and go.sum cover every dependency.
package components

import _ "sigs.k8s.io/aws-iam-authenticator/cmd/aws-iam-authenticator"
