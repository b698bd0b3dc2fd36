package cli

import (
	"context"
	"crypto/tls"
	"strings"
	"unicode/utf8"

	"github.com/droverproject/drover/nbd/client"
)

// transmissionFlags are the names of transmission flags by their bits, as qemu-nbd lists them.
var transmissionFlags = []struct {
	bit  uint16
	name string
}{
	{1 << 1, "readonly"}, {1 << 2, "flush"}, {1 << 3, "fua"}, {1 << 4, "rotational"}, {1 << 5, "trim"}, {1 << 6, "zeroes"},
	{1 << 7, "df"}, {1 << 8, "multi"}, {1 << 9, "resize"}, {1 << 10, "cache"}, {1 << 11, "fast-zero"},
}

// listExports shows what another server has.
func (n *qemuNBD) listExports(ctx context.Context, config *tls.Config) error {
	d := client.Dialing{TLS: config, Hostname: n.hostname, Address: client.Address{Path: n.socket}}
	if n.socket == "" {
		d.Address = client.Address{Host: n.host(), Port: n.portNumber()}
	}
	list, err := client.List(ctx, d)
	if err != nil {
		return err
	}
	n.printf("exports available: %d\n", len(list))
	for i := range list {
		n.listExport(&list[i])
	}
	return nil
}

func (n *qemuNBD) listExport(e *client.Export) {
	n.printf(" export: '%s'\n", shown(e.Name))
	if e.Description != "" {
		n.printf("  description: %s\n", shown(e.Description))
	}
	if e.Flags&1 == 0 {
		return // the server tells no more
	}
	n.printf("  size:  %d\n", e.Size)
	n.printf("  flags: 0x%x (", e.Flags)
	for _, name := range flagNames(e.Flags) {
		n.printf(" %s", name)
	}
	n.printf(" )\n")
	if e.MinBlock != 0 {
		n.printf("  min block: %d\n  opt block: %d\n  max block: %d\n", e.MinBlock, e.PreferBlock, e.MaxBlock)
	}
	if len(e.Contexts) > 0 {
		n.printf("  available meta contexts: %d\n", len(e.Contexts))
		for _, c := range e.Contexts {
			n.printf("   %s\n", shown(c))
		}
	}
}

func flagNames(flags uint16) []string {
	var names []string
	for _, f := range transmissionFlags {
		if flags&f.bit != 0 {
			names = append(names, f.name)
		}
	}
	return names
}

// shown is what a server has said, without what would take control of a terminal.
func shown(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == utf8.RuneError {
			return '?'
		}
		return r
	}, s)
}
