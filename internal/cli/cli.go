// Package cli is the command line of drover: it turns flags into calls of the packages below, and what they return into
// text, JSON and exit codes. It knows nothing of image formats beyond the names of their options.
//
// Where a command exists in qemu-img, its flags, output, messages and exit codes are those of qemu-img 7.2, so that
// scripts need not be rewritten; only the name in front of a message differs.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	_ "github.com/droverproject/drover/qcow2" // registers the format
)

// program is the name of this program. It may be started under those of others.
const program = "drover"

// app is one run of the program.
type app struct {
	name     string // under which it was started: it stands before every message
	args     []string
	in       io.Reader
	out, err io.Writer
}

// personality is the program that drover is when it is started under that program's name.
type personality struct {
	name string
	run  func(a *app, ctx context.Context, args []string) error
}

// personalities are the names that drover answers to. Under any other it is itself.
func personalities() []personality {
	return []personality{
		{program, (*app).runDrover},
		{"qemu-img", (*app).runQemuImg},
		{"qemu-io", (*app).runQemuIO},
		{"qemu-nbd", (*app).runQemuNBD},
	}
}

// Main runs the program under the name that it was started by, as busybox does: a link called qemu-img makes it behave as
// qemu-img. It returns the exit code.
func Main(ctx context.Context, argv0 string, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	base := strings.TrimSuffix(filepath.Base(argv0), ".exe")
	all := personalities()
	i := max(0, slices.IndexFunc(all, func(p personality) bool { return p.name == base }))
	a := &app{name: all[i].name, args: args, in: stdin, out: stdout, err: stderr}
	return a.end(all[i].run(a, ctx, args))
}

// exitError ends the program with a code of its own. An empty message says that everything has been said.
type exitError struct {
	code int
	msg  string
}

func (e *exitError) Error() string { return e.msg }

// usageError is a mistake in the command line: it is followed by a hint where help is.
type usageError struct{ msg string }

func (e *usageError) Error() string { return e.msg }

func usagef(format string, args ...any) error { return &usageError{fmt.Sprintf(format, args...)} }

// errorf makes an error of qemu-img's words. They begin with a capital letter and may have more than one line, against
// the custom of this language: scripts and people know them as they are.
func errorf(format string, args ...any) error { return fmt.Errorf(format, args...) }

// Run runs drover under its own name with the given arguments (without the name) and returns its exit code.
func Run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	return Main(ctx, program, args, strings.NewReader(""), stdout, stderr)
}

func (a *app) runDrover(ctx context.Context, args []string) error {
	root := a.rootCommand()
	a.completeFlags(root)
	return a.execute(ctx, root, args)
}

func (a *app) execute(ctx context.Context, root *cobra.Command, args []string) error {
	root.SetArgs(args)
	return root.ExecuteContext(ctx)
}

// end tells the user what went wrong, if anything, and returns the exit code.
func (a *app) end(err error) int {
	if err == nil {
		return 0
	}
	code := 1
	var exit *exitError
	if errors.As(err, &exit) {
		code = exit.code
	}
	a.tell(err)
	var usage *usageError
	if errors.As(err, &usage) {
		fmt.Fprintf(a.err, "Try '%s --help' for more information\n", a.name)
	}
	return code
}

// tell writes an error, or each of several.
func (a *app) tell(err error) {
	var many *messages
	if errors.As(err, &many) {
		for _, e := range many.errs {
			a.tell(e)
		}
		return
	}
	if msg := err.Error(); msg != "" {
		a.say("%s", msg)
	}
}

// messages are several errors, each of which is told in a line of its own that begins with the program's name.
type messages struct{ errs []error }

func (m *messages) Error() string   { return errors.Join(m.errs...).Error() }
func (m *messages) Unwrap() []error { return m.errs }

// thenf adds a message after an error.
func thenf(err error, format string, args ...any) error {
	return &messages{[]error{err, errorf(format, args...)}}
}

// say writes a message for the user to standard error.
func (a *app) say(format string, args ...any) {
	fmt.Fprintf(a.err, a.name+": "+format+"\n", args...)
}

// warn is say for a warning.
func (a *app) warn(text string) { a.say("warning: %s", text) }

// printf writes output.
func (a *app) printf(format string, args ...any) { fmt.Fprintf(a.out, format, args...) }

// usageTemplate is how a command's help ends.
const usageTemplate = `Usage:
  {{.UseLine}}{{if .HasExample}}

Examples:
{{.Example}}{{end}}{{if .HasAvailableSubCommands}}

Commands:{{range .Commands}}{{if .IsAvailableCommand}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}{{end}}{{if .HasAvailableLocalFlags}}

Flags:
{{.LocalFlags.FlagUsages | trimTrailingWhitespaces}}{{end}}{{if .HasAvailableSubCommands}}

'{{.CommandPath}} COMMAND --help' tells more about a command.{{end}}
`

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   program + " COMMAND [flags]",
		Short: "Create, examine, check and serve disk images",
		Long: `drover works with disk images in the formats qcow2 and raw.

Commands that qemu-img has take the same flags, print the same output and end
with the same exit codes. An image that somebody else made may name other files
(a backing file, a data file): drover follows such a name only to files in the
image's own folder and below, unless --allow-path or --allow-any-path says
otherwise.`,
		Example: `  drover create -f qcow2 disk.qcow2 20G
  drover info --output=json disk.qcow2
  drover serve --socket /run/disk.sock disk.qcow2`,
		Args:          cobra.ArbitraryArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if v, err := cmd.Flags().GetBool("version"); err == nil && v {
				a.printVersion()
				return nil
			}
			if len(args) == 0 {
				return usagef("Not enough arguments")
			}
			return usagef("Command not found: %s", args[0])
		},
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(flagError)
	root.SetUsageTemplate(usageTemplate)
	root.Flags().BoolP("version", "V", false, "print the version and exit")
	root.SetHelpCommand(&cobra.Command{
		Use:    "help [COMMAND]",
		Short:  "Show help for a command",
		Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, _, err := root.Find(args)
			if err != nil || c == root && len(args) > 0 {
				return usagef("Command not found: %s", strings.Join(args, " "))
			}
			c.InitDefaultHelpFlag() // cobra adds it only to the command that runs
			return c.Help()
		},
	})
	root.AddCommand(append(a.imageCommands(), a.ownCommands()...)...)
	root.AddCommand(a.serveCommand(), a.tcmuCommand(), a.ctlCommand(), a.nbdCommand(), a.versionCommand())
	for _, c := range root.Commands() {
		c.Flags().SortFlags = false
	}
	return root
}

// imageCommands are those that qemu-img has too.
func (a *app) imageCommands() []*cobra.Command {
	return []*cobra.Command{
		a.amendCommand(), a.benchCommand(), a.bitmapCommand(), a.checkCommand(), a.commitCommand(), a.compareCommand(), a.convertCommand(), a.createCommand(), a.ddCommand(),
		a.infoCommand(), a.mapCommand(), a.measureCommand(), a.rebaseCommand(), a.resizeCommand(), a.snapshotCommand(),
	}
}

// flagError says what is wrong with a flag in the words of getopt, which qemu-img uses.
func flagError(_ *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if errors.As(err, &unknown) {
		if short := unknown.GetSpecifiedShortnames(); short != "" {
			return usagef("unrecognized option '-%s'", short)
		}
		return usagef("unrecognized option '--%s'", unknown.GetSpecifiedName())
	}
	var missing *pflag.ValueRequiredError
	if errors.As(err, &missing) {
		if short := missing.GetSpecifiedShortnames(); short != "" {
			return usagef("missing argument for option '-%s'", short)
		}
		return usagef("missing argument for option '--%s'", missing.GetSpecifiedName())
	}
	return usagef("%s", err)
}

// oneImage is the argument check of commands that work on one image.
func oneImage(_ *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usagef("Expecting one image file name")
	}
	return nil
}

// outputFlag adds --output.
func outputFlag(cmd *cobra.Command, output *string) {
	cmd.Flags().StringVar(output, "output", "human", "`format` of the output: human or json")
}

func checkOutput(output string) error {
	if output != "human" && output != "json" {
		return errorf("--output must be used with human or json as argument.")
	}
	return nil
}
