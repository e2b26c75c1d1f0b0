package main

import (
	"bufio"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hpke"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// What agents say of a key.
type wrappedKey struct {
	Version    int    `json:"version"`
	Epoch      string `json:"epoch"`
	Key        uint64 `json:"key"`
	Session    string `json:"session"`
	Algorithms string `json:"algorithms"`
	Recipients []struct {
		Recipient    string `json:"recipient"`
		Encapsulated []byte `json:"encapsulated"`
		Wrapped      []byte `json:"wrapped"`
	} `json:"recipients"`
}

// What is needed of an event.
type event struct {
	Epoch   string `json:"epoch"`
	Session string `json:"session"`
	Request string `json:"request"`
	Type    string `json:"type"`
	Data    struct {
		Channel    string          `json:"channel"`
		Connection json.RawMessage `json:"connection"`
		Offset     uint64          `json:"offset"`
		Encrypted  *struct {
			Key  uint64 `json:"key"`
			Data []byte `json:"data"`
		} `json:"encrypted"`
	} `json:"data"`
}

// decrypt writes what is encrypted in the events, one a line, with the keys in a folder.
func decrypt(identity, keys, events string, out io.Writer) error {
	private, err := readIdentity(identity)
	if err != nil {
		return err
	}
	file, err := os.Open(events)
	if err != nil {
		return err
	}
	defer file.Close()
	lines := bufio.NewReader(file)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) && len(line) == 0 {
			return nil
		} else if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		var given event
		if err := json.Unmarshal(line, &given); err != nil {
			return err
		}
		if given.Type != "content" || given.Data.Encrypted == nil {
			continue
		}
		content, err := given.open(private, keys)
		if err != nil {
			return fmt.Errorf("key %d: %w", given.Data.Encrypted.Key, err)
		}
		if _, err := out.Write(content); err != nil {
			return err
		}
	}
}

func readIdentity(path string) (*ecdh.PrivateKey, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("the identity is no PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	private, ok := key.(*ecdh.PrivateKey)
	if !ok {
		return nil, errors.New("the identity is no X25519 key")
	}
	return private, nil
}

func (given *event) open(private *ecdh.PrivateKey, keys string) ([]byte, error) {
	sealed := given.Data.Encrypted
	text, err := os.ReadFile(filepath.Join(keys, fmt.Sprintf("%020d.key", sealed.Key)))
	if err != nil {
		return nil, err
	}
	var wrapped wrappedKey
	if err := json.Unmarshal(text, &wrapped); err != nil {
		return nil, err
	}
	key, err := wrapped.unwrap(private)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	bound := []any{"weir content v1", given.Epoch, sealed.Key, given.Session, given.Request, given.Data.Channel, given.Data.Connection, given.Data.Offset}
	context, err := json.Marshal(bound)
	if err != nil {
		return nil, err
	}
	if len(sealed.Data) < aead.NonceSize() {
		return nil, errors.New("content is too short")
	}
	nonce, rest := sealed.Data[:aead.NonceSize()], sealed.Data[aead.NonceSize():]
	return aead.Open(nil, nonce, rest, context)
}

func (wrapped *wrappedKey) unwrap(private *ecdh.PrivateKey) ([]byte, error) {
	digest := sha256.Sum256(private.PublicKey().Bytes())
	name := hex.EncodeToString(digest[:8])
	recipient, err := hpke.NewDHKEMPrivateKey(private)
	if err != nil {
		return nil, err
	}
	context, err := json.Marshal([]any{wrapped.Epoch, wrapped.Key, wrapped.Session})
	if err != nil {
		return nil, err
	}
	for _, given := range wrapped.Recipients {
		if given.Recipient != name {
			continue
		}
		opener, err := hpke.NewRecipient(given.Encapsulated, recipient, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte("weir content key v1"))
		if err != nil {
			return nil, err
		}
		return opener.Open(context, given.Wrapped)
	}
	return nil, errors.New("wrapped to others")
}
