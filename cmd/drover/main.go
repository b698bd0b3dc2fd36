// Command drover works with disk images: it creates, examines, checks and serves them.
package main

import (
	"context"
	"os"

	"github.com/droverproject/drover/internal/cli"
	_ "github.com/droverproject/drover/luks/ciphers" // twofish, cast5 and ripemd160 for encrypted images
)

func main() { os.Exit(cli.Run(context.Background(), os.Args[1:], os.Stdout, os.Stderr)) }
