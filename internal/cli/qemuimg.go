package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/internal/cli/getopt"
)

// imgCommand is a command of qemu-img with the options that it has there.
type imgCommand struct {
	name string
	// letters are the short options, as getopt writes them; longs the long ones: "name", "name=" with an argument, "name:f"
	// and "name=f" for another name of -f.
	letters, longs string
	usage          string // of qemu-img's help
}

// imgCommands are the commands of qemu-img.
func imgCommands() []imgCommand {
	return []imgCommand{
		{
			"amend", "hf:o:t:pq", "help:h object= image-opts force",
			"[--object objectdef] [--image-opts] [-p] [-q] [-f fmt] [-t cache] [--force] -o options filename",
		},
		{
			"bench", "hc:d:f:i:no:qs:t:wS:U", "help:h image-opts force-share:U flush-interval= pattern= no-drain",
			"[-c count] [-d depth] [-f fmt] [--flush-interval=flush_interval] [-i aio] [-n] [--no-drain] [-o offset] " +
				"[--pattern=pattern] [-q] [-s buffer_size] [-S step_size] [-t cache] [-w] [-U] filename",
		},
		{
			"bitmap", "hb:f:g:F:", "help:h object= image-opts add remove clear enable disable merge= source-file=b " +
				"source-format=F granularity=g",
			"(--merge SOURCE | --add | --remove | --clear | --enable | --disable)... [-b source_file [-F source_fmt]] " +
				"[-g granularity] [--object objectdef] [--image-opts | -f fmt] filename bitmap",
		},
		{
			"check", "hf:qr:T:U", "help:h object= image-opts format=f output= force-share:U repair=r",
			"[--object objectdef] [--image-opts] [-q] [-f fmt] [--output=ofmt] [-r [leaks | all]] [-T src_cache] [-U] filename",
		},
		{
			"commit", "hb:df:pqr:t:", "help:h object= image-opts",
			"[--object objectdef] [--image-opts] [-q] [-f fmt] [-t cache] [-b base] [-r rate_limit] [-d] [-p] filename",
		},
		{
			"compare", "hf:pqsF:T:U", "help:h object= image-opts force-share:U",
			"[--object objectdef] [--image-opts] [-f fmt] [-F fmt] [-T src_cache] [-p] [-q] [-s] [-U] filename1 filename2",
		},
		{
			"convert", "hcf:l:m:no:pqr:t:B:CF:O:S:T:UW", "help:h object= image-opts force-share:U target-image-opts target-is-zero " +
				"salvage bitmaps skip-broken-bitmaps",
			"[--object objectdef] [--image-opts] [--target-image-opts] [--target-is-zero] [--bitmaps] [-U] [-C] [-c] [-p] [-q] " +
				"[-n] [-f fmt] [-t cache] [-T src_cache] [-O output_fmt] [-B backing_file [-F backing_fmt]] [-o options] " +
				"[-l snapshot_param] [-S sparse_size] [-r rate_limit] [-m num_coroutines] [-W] [--salvage] filename " +
				"[filename2 [...]] output_filename",
		},
		{
			"create", "hb:f:o:quF:", "help:h object=",
			"[--object objectdef] [-q] [-f fmt] [-b backing_file [-F backing_fmt]] [-u] [-o options] filename [size]",
		},
		{
			"dd", "hf:O:U", "help:h object= image-opts force-share:U",
			"[--image-opts] [-U] [-f fmt] [-O output_fmt] [bs=block_size] [count=blocks] [skip=blocks] if=input of=output",
		},
		{
			"info", "hf:U", "help:h object= image-opts format=f output= backing-chain force-share:U",
			"[--object objectdef] [--image-opts] [-f fmt] [--output=ofmt] [--backing-chain] [-U] filename",
		},
		{
			"map", "hf:l:s:U", "help:h object= image-opts format=f output= force-share:U start-offset=s max-length=l",
			"[--object objectdef] [--image-opts] [-f fmt] [--start-offset=offset] [--max-length=len] [--output=ofmt] [-U] filename",
		},
		{
			"measure", "hf:l:o:O:U", "help:h image-opts object= output= size= force-share:U",
			"[--output=ofmt] [-O output_fmt] [-o options] [--size N | [--object objectdef] [--image-opts] [-f fmt] " +
				"[-l snapshot_param] filename]",
		},
		{
			"snapshot", "ha:c:d:lqU", "help:h object= image-opts force-share:U",
			"[--object objectdef] [--image-opts] [-U] [-q] [-l | -a snapshot | -c snapshot | -d snapshot] filename",
		},
		{
			"rebase", "hb:f:pqt:uF:T:U", "help:h object= image-opts force-share:U",
			"[--object objectdef] [--image-opts] [-U] [-q] [-f fmt] [-t cache] [-T src_cache] [-p] [-u] -b backing_file " +
				"[-F backing_fmt] filename",
		},
		{
			"resize", "hf:q", "help:h object= image-opts preallocation= shrink",
			"[--object objectdef] [--image-opts] [-f fmt] [--preallocation=prealloc] [-q] [--shrink] filename [+ | -]size",
		},
	}
}

// firstLong is the ID of the first long option that has no letter.
const firstLong = 1 << 21 // behind all letters

// options are the command's options. The ID of a long one without a letter is firstLong plus its place in longs.
func (c imgCommand) options() []getopt.Option {
	var list []getopt.Option
	for _, letter := range c.letters {
		if letter == ':' {
			list[len(list)-1].Arg = getopt.Required
			continue
		}
		list = append(list, getopt.Option{ID: letter, Short: true})
	}
	for i, word := range strings.Fields(c.longs) {
		at := strings.IndexAny(word, "=:")
		if at < 0 {
			at = len(word)
		}
		o := getopt.Option{ID: rune(firstLong + i), Long: word[:at]}
		if strings.HasPrefix(word[at:], "=") {
			o.Arg = getopt.Required
		}
		if at+1 < len(word) {
			o.ID = rune(word[at+1])
		}
		list = append(list, o)
	}
	return list
}

// errHelp ends the reading of options: help is wanted, whatever else there is.
var errHelp = errors.New("help is wanted")

// canonical reads a command's arguments as qemu-img does and returns them in a form that leaves nothing open: options
// first, each in words of its own, "--", and the rest.
func (c imgCommand) canonical(args []string) ([]string, error) {
	options := c.options()
	var given []string
	rest, err := getopt.Parse(options, args, func(id rune, value string) error {
		o := options[slices.IndexFunc(options, func(o getopt.Option) bool { return o.ID == id })]
		switch {
		case id == 'h':
			return errHelp
		case o.Short && o.Arg == getopt.None:
			given = append(given, "-"+string(id))
		case o.Short:
			given = append(given, "-"+string(id), value)
		case o.Arg == getopt.None:
			given = append(given, "--"+o.Long)
		default:
			given = append(given, "--"+o.Long+"="+value)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return append(append(given, "--"), rest...), nil
}

// imgMistake words a mistake in the command line as qemu-img does.
func imgMistake(err error) error {
	var mistake *getopt.Error
	switch {
	case !errors.As(err, &mistake):
		return err
	case mistake.Missing:
		return usagef("missing argument for option '%s'", mistake.Word)
	}
	return usagef("unrecognized option '%s'", mistake.Word)
}

// imgGlobals are the options that stand before the command.
var imgGlobals = []getopt.Option{
	{ID: 'h', Short: true, Long: "help"},
	{ID: 'V', Short: true, Long: "version"},
	{ID: 'T', Short: true, Long: "trace", Arg: getopt.Required},
}

// errVersion ends the reading of options: the version is wanted.
var errVersion = errors.New("the version is wanted")

// runQemuImg is drover under the name of qemu-img: the commands and options that qemu-img has, and no others.
func (a *app) runQemuImg(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return usagef("Not enough arguments")
	}
	rest, err := getopt.ParseLeading(imgGlobals, args, func(id rune, _ string) error {
		switch id {
		case 'h':
			return errHelp
		case 'V':
			return errVersion
		}
		return nil // there is nothing to trace
	})
	switch {
	case errors.Is(err, errHelp):
		a.imgHelp()
		return nil
	case errors.Is(err, errVersion):
		a.printStandIn()
		return nil
	case err != nil:
		return imgMistake(err)
	case len(rest) == 0:
		return nil // as qemu-img does
	}
	return a.runImgCommand(ctx, rest[0], rest[1:])
}

func (a *app) runImgCommand(ctx context.Context, name string, args []string) error {
	all := imgCommands()
	i := slices.IndexFunc(all, func(c imgCommand) bool { return c.name == name })
	if i < 0 {
		return usagef("Command not found: %s", name)
	}
	makers := imageMakers()
	made := slices.IndexFunc(makers, func(m maker) bool { return m.name == name })
	if made < 0 {
		return usagef("Command not found: %s", name)
	}
	root := a.rootCommand(makers[made : made+1])
	root.Use = a.name + " COMMAND [flags]"
	cmd := root.Commands()[0]
	last := args
	if name == "resize" {
		// The size may begin with a minus sign. It is the last argument, whatever it looks like.
		if len(args) < 2 {
			return usagef("Not enough arguments")
		}
		args, last = args[:len(args)-1], args[len(args)-1:]
	}
	args, err := all[i].canonical(args)
	switch {
	case errors.Is(err, errHelp):
		a.imgHelp()
		return nil
	case err != nil && name == "measure":
		// It leaves the word to the C library, and the end to its help.
		fmt.Fprintf(a.err, "%s: %s\n", name, err)
		a.imgHelp()
		return nil
	case err != nil:
		return imgMistake(err)
	}
	line := append([]string{name}, trusting(cmd)...)
	line = append(line, args...)
	if name == "resize" {
		line = append(line, last...)
	}
	return a.execute(ctx, root, line)
}

// trusting is what lets a command follow the names inside images wherever they lead, as qemu-img does. Whoever wants them
// judged calls drover by its own name.
func trusting(cmd *cobra.Command) []string {
	if cmd.Flags().Lookup("allow-any-path") == nil {
		return nil
	}
	return []string{"--allow-any-path"}
}

// imgHelp prints the help of qemu-img, in our words but for what programs may look for: the commands with their options,
// and the formats.
func (a *app) imgHelp() {
	a.printStandIn()
	a.printf("usage: %s [standard options] command [command options]\n", a.name)
	a.printf(`QEMU disk image utility, provided by %s

    '-h', '--help'       print this help and exit
    '-V', '--version'    print the version and exit
    '-T', '--trace'      accepted, without effect

Command syntax:
`, program)
	own := imageMakers()
	for _, c := range imgCommands() {
		if slices.ContainsFunc(own, func(m maker) bool { return m.name == c.name }) {
			a.printf("  %s %s\n", c.name, c.usage)
		}
	}
	a.printf(`
'%s COMMAND --help' tells more about a command.

Sizes take the suffixes k, M, G, T, P and E, for powers of 1024. Cache modes are
none, writeback, writethrough, directsync and unsafe.

Supported formats: %s
`, program, strings.Join(imgFormats(), " "))
}

// imgFormats are the formats and drivers by name.
func imgFormats() []string {
	all := append(block.Formats(), block.Drivers()...)
	slices.Sort(all)
	return slices.Compact(all)
}
