// An OpenID provider for tests: zitadel's example server with an issuer on https, and users, groups and clients from a
// file. Everything that is protocol is zitadel's: discovery, keys, login, tokens. Its signing key is made when it starts.
package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"os"
	"time"

	"github.com/zitadel/oidc/v3/example/server/exampleop"
	"github.com/zitadel/oidc/v3/example/server/storage"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

// readHeaderTimeout bounds how long a client may take to say what it wants.
const readHeaderTimeout = 10 * time.Second

// configuration is the file that the one argument names.
type configuration struct {
	Issuer      string
	Address     string
	Certificate string
	Key         string
	Clients     []client
	Users       map[string]user
}

// client is an application that users log in to: the audience of its tokens.
type client struct {
	ID              string
	Secret          string
	LifetimeSeconds int
}

// user is who logs in; the key in Users is the subject of the tokens.
type user struct {
	Password      string
	Email         string
	EmailVerified bool
	Groups        []string
}

// lived has ID tokens of a lifetime that the example has fixed, with the claims of all scopes in them.
type lived struct {
	op.Client
	lifetime time.Duration
}

func (l lived) IDTokenLifetime() time.Duration { return l.lifetime }

func (l lived) IDTokenUserinfoClaimsAssertion() bool { return true }

// grouped adds to the example's storage what it has not: lifetimes, and the users' groups.
type grouped struct {
	*storage.Storage
	lifetimes map[string]time.Duration
	groups    map[string][]string
}

func (g grouped) GetClientByClientID(ctx context.Context, id string) (op.Client, error) {
	found, err := g.Storage.GetClientByClientID(ctx, id)
	if err != nil {
		return nil, err
	}
	return lived{Client: found, lifetime: g.lifetimes[id]}, nil
}

func (g grouped) SetUserinfoFromRequest(
	ctx context.Context, info *oidc.UserInfo, request op.IDTokenRequest, scopes []string,
) error {
	if err := g.Storage.SetUserinfoFromRequest(ctx, info, request, scopes); err != nil {
		return err
	}
	info.AppendClaims("groups", g.groups[request.GetSubject()])
	return nil
}

// userStore is the users of the configuration; they log in by their subject.
type userStore map[string]*storage.User

func (u userStore) GetUserByID(id string) *storage.User { return u[id] }

func (u userStore) GetUserByUsername(name string) *storage.User { return u[name] }

func (u userStore) ExampleClientID() string { return storage.ServiceUserID }

func serve(path string, logger *slog.Logger) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var config configuration
	if err := json.Unmarshal(text, &config); err != nil {
		return err
	}
	store := grouped{lifetimes: map[string]time.Duration{}, groups: map[string][]string{}}
	for _, client := range config.Clients {
		storage.RegisterClients(storage.WebClient(client.ID, client.Secret))
		store.lifetimes[client.ID] = time.Duration(client.LifetimeSeconds) * time.Second
	}
	users := userStore{}
	for id, user := range config.Users {
		users[id] = &storage.User{
			ID: id, Username: id, Password: user.Password, Email: user.Email, EmailVerified: user.EmailVerified,
		}
		store.groups[id] = user.Groups
	}
	store.Storage = storage.NewStorage(users)
	server := &http.Server{
		Addr:              config.Address,
		Handler:           exampleop.SetupServer(config.Issuer, store, logger, false),
		ReadHeaderTimeout: readHeaderTimeout,
	}
	return server.ListenAndServeTLS(config.Certificate, config.Key)
}

func main() {
	logger := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if len(os.Args) != 2 {
		logger.Error("usage: identity-provider CONFIGURATION")
		os.Exit(2)
	}
	if err := serve(os.Args[1], logger); err != nil {
		logger.Error("ended", "error", err)
		os.Exit(1)
	}
}
