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
	root := a.rootCommand(makersFor(args))
	if len(args) > 0 && strings.HasPrefix(args[0], cobra.ShellCompRequestCmd) {
		a.completeFlags(root)
	}
	return a.execute(ctx, root, args)
}

// maker makes a command. Most runs need one of them only, and to make all takes longer than many a command runs.
type maker struct {
	name string
	make func(*app) *cobra.Command
}

// imageMakers make the commands that qemu-img has too.
func imageMakers() []maker {
	return []maker{
		{"amend", (*app).amendCommand}, {"bench", (*app).benchCommand}, {"bitmap", (*app).bitmapCommand}, {"check", (*app).checkCommand},
		{"commit", (*app).commitCommand}, {"compare", (*app).compareCommand}, {"convert", (*app).convertCommand},
		{"create", (*app).createCommand}, {"dd", (*app).ddCommand}, {"info", (*app).infoCommand}, {"map", (*app).mapCommand},
		{"measure", (*app).measureCommand}, {"rebase", (*app).rebaseCommand}, {"resize", (*app).resizeCommand},
		{"snapshot", (*app).snapshotCommand},
	}
}

// allMakers make all commands of drover.
func allMakers() []maker {
	return append(append(imageMakers(), ownMakers()...), maker{"serve", (*app).serveCommand}, maker{"tcmu", (*app).tcmuCommand},
		maker{"ctl", (*app).ctlCommand}, maker{"nbd", (*app).nbdCommand}, maker{"version", (*app).versionCommand})
}

// wantAll are the commands that look at all the others.
var wantAll = []string{"completion", "man"}

// makersFor are those of the commands that a command line needs: the one that it begins with, or all of them where it begins
// with something else, such as help.
func makersFor(args []string) []maker {
	all := allMakers()
	if len(args) == 0 || slices.Contains(wantAll, args[0]) {
		return all
	}
	if i := slices.IndexFunc(all, func(m maker) bool { return m.name == args[0] }); i >= 0 {
		return all[i : i+1]
	}
	return all
}

func (a *app) commands(makers []maker) []*cobra.Command {
	list := make([]*cobra.Command, len(makers))
	for i, m := range makers {
		list[i] = m.make(a)
	}
	return list
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

// usage is how a command's help ends. It is no template: text/template calls methods by their names, and a program that contains
// it keeps every method of every type, which makes drover an eighth larger, in memory too.
func (a *app) usage(cmd *cobra.Command) error {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage:\n  %s", cmd.UseLine())
	if cmd.HasExample() {
		fmt.Fprintf(&b, "\n\nExamples:\n%s", cmd.Example)
	}
	if cmd.HasAvailableSubCommands() {
		b.WriteString("\n\nCommands:")
		for _, c := range cmd.Commands() {
			if c.IsAvailableCommand() {
				fmt.Fprintf(&b, "\n  %-*s %s", c.NamePadding(), c.Name(), c.Short)
			}
		}
	}
	if cmd.HasAvailableLocalFlags() {
		fmt.Fprintf(&b, "\n\nFlags:\n%s", strings.TrimRight(cmd.LocalFlags().FlagUsages(), " \t\n"))
	}
	if cmd.HasAvailableSubCommands() {
		fmt.Fprintf(&b, "\n\n'%s COMMAND --help' tells more about a command.", cmd.CommandPath())
	}
	b.WriteString("\n")
	_, err := io.WriteString(cmd.OutOrStderr(), b.String())
	return err
}

// rootCommand is the command above those that the makers make.
func (a *app) rootCommand(makers []maker) *cobra.Command {
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
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true}, // there is one of our own
	}
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(flagError)
	root.SetUsageFunc(a.usage)
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
	root.AddCommand(a.commands(makers)...)
	for _, c := range root.Commands() {
		c.Flags().SortFlags = false
	}
	return root
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
