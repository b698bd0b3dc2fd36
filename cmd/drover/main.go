// Command drover works with disk images: it creates, examines, checks and serves them.
package main

import (
	"context"
	"os"

	"github.com/droverproject/drover/internal/cli"
)

func main() { os.Exit(cli.Run(context.Background(), os.Args[1:], os.Stdout, os.Stderr)) }
