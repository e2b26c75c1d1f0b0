// Command msk-signer prints a token for Amazon MSK, as AWS's own signer makes it of the credentials in the environment.
//
//	msk-signer REGION
package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/aws/aws-msk-iam-sasl-signer-go/signer"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: msk-signer REGION")
	}
	token, _, err := signer.GenerateAuthToken(context.Background(), args[0])
	if err != nil {
		return err
	}
	_, err = fmt.Println(token)
	return err
}
