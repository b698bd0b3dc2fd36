// Command drover works with disk images: it creates, examines, checks and serves them. Started under the name of a program
// that it can stand in for (a link called qemu-img), it behaves as that program.
package main

import (
	"context"
	"os"

	"github.com/droverproject/drover/internal/cli"
	_ "github.com/droverproject/drover/luks/ciphers" // twofish, cast5 and ripemd160 for encrypted images
)

func main() {
	os.Exit(cli.Main(context.Background(), os.Args[0], os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
