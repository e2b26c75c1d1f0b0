// Command note-verifier checks what Weir signs with the libraries that other transparency logs use: notes with Go's
// sumdb/note, checkpoints with the C2SP parser, inclusion proofs with transparency-dev's verifier.
//
//	note-verifier KEYS CHECKPOINT                          prints the number of events and the root
//	note-verifier KEYS CHECKPOINT EVENTS PROOFS            also checks each event of an export
//	note-verifier IDENTITY KEYS_FOLDER EVENTS              prints what is encrypted in events, with Go's HPKE
package main

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/transparency-dev/formats/log"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/mod/sumdb/note"
)

type inclusion struct {
	Sequence uint64   `json:"sequence"`
	Path     []string `json:"path"`
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch len(args) {
	case 2, 4:
	case 3:
		return decrypt(args[0], args[1], args[2], os.Stdout)
	default:
		return errors.New("usage: note-verifier KEYS CHECKPOINT [EVENTS PROOFS] | IDENTITY KEYS_FOLDER EVENTS")
	}
	keys, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	var verifiers []note.Verifier
	for _, line := range strings.Fields(string(keys)) {
		verifier, err := note.NewVerifier(line)
		if err != nil {
			return err
		}
		verifiers = append(verifiers, verifier)
	}
	signed, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	opened, err := note.Open(signed, note.VerifierList(verifiers...))
	if err != nil {
		return err
	}
	if len(opened.Sigs) != len(verifiers) || len(opened.UnverifiedSigs) != 0 {
		return fmt.Errorf("%d signatures verified and %d not, with %d keys", len(opened.Sigs), len(opened.UnverifiedSigs), len(verifiers))
	}
	origin, _, _ := strings.Cut(opened.Text, "\n")
	checkpoint, _, _, err := log.ParseCheckpoint(signed, origin, verifiers[0])
	if err != nil {
		return err
	}
	if len(args) == 4 {
		if err := included(args[2], args[3], checkpoint); err != nil {
			return err
		}
	}
	fmt.Printf("%d %s\n", checkpoint.Size, hex.EncodeToString(checkpoint.Hash))
	return nil
}

func included(events, proofs string, checkpoint *log.Checkpoint) error {
	eventFile, err := os.Open(events)
	if err != nil {
		return err
	}
	proofFile, err := os.Open(proofs)
	if err != nil {
		return err
	}
	lines, decoder := bufio.NewReader(eventFile), json.NewDecoder(proofFile)
	for {
		var given inclusion
		if err := decoder.Decode(&given); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return err
		}
		var path [][]byte
		for _, node := range given.Path {
			hash, err := hex.DecodeString(node)
			if err != nil {
				return err
			}
			path = append(path, hash)
		}
		leaf := rfc6962.DefaultHasher.HashLeaf(line[:len(line)-1])
		if err := proof.VerifyInclusion(rfc6962.DefaultHasher, given.Sequence, checkpoint.Size, leaf, path, checkpoint.Hash); err != nil {
			return fmt.Errorf("event %d: %w", given.Sequence, err)
		}
	}
}
