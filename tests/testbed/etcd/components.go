//go:build tools

// Package components pins what is built, so that go.mod and go.sum cover every dependency.
package components

import _ "go.etcd.io/etcd/server/v3/etcdmain"
