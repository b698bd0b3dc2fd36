package cli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func (a *app) manCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "man DIR",
		Short: "Write the manual pages of all commands",
		Long: `Write the manual pages of drover and its commands to DIR, which must exist:
drover.1, drover-convert.1 and so on.`,
		Example: `  drover man /usr/local/share/man/man1`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usagef("Expecting the name of a folder")
			}
			return writeManuals(cmd.Root(), args[0])
		},
	}
}

// writeManuals writes the page of a command and those of its commands.
func writeManuals(cmd *cobra.Command, dir string) error {
	f, err := os.Create(filepath.Join(dir, manualName(cmd)+".1"))
	if err != nil {
		return errorf("Could not write a manual page: %w", err)
	}
	if err := errors.Join(manual(f, cmd), f.Close()); err != nil {
		return errorf("Could not write a manual page: %w", err)
	}
	for _, c := range cmd.Commands() {
		if !c.IsAvailableCommand() {
			continue
		}
		if err := writeManuals(c, dir); err != nil {
			return err
		}
	}
	return nil
}

func manualName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

// manual writes one page in the macros of man(7).
func manual(out io.Writer, cmd *cobra.Command) error {
	m := &roff{bufio.NewWriter(out)}
	name := manualName(cmd)
	inherited := cmd.InheritedFlags() // before the synopsis, which says [flags] only if it knows of some
	m.macro(".TH", strings.ToUpper(name), "1", "", program+" "+version(), "User Commands")
	m.section("NAME")
	m.line(name + " - " + lower(cmd.Short))
	m.section("SYNOPSIS")
	m.macro(".B", cmd.UseLine())
	m.section("DESCRIPTION")
	long := cmd.Long
	if long == "" {
		long = cmd.Short + "."
	}
	m.text(long)
	m.flags("OPTIONS", cmd.LocalFlags())
	m.flags("OPTIONS OF ALL ITS COMMANDS", inherited)
	if cmd.HasAvailableSubCommands() {
		m.section("COMMANDS")
		for _, c := range cmd.Commands() {
			if c.IsAvailableCommand() {
				m.item(bold(c.Name()), c.Short+".")
			}
		}
	}
	if cmd.HasExample() {
		m.section("EXAMPLES")
		m.literal(strings.Split(cmd.Example, "\n"))
	}
	m.section("SEE ALSO")
	var see []string
	if cmd.HasParent() {
		see = append(see, manualName(cmd.Parent())+"(1)")
	}
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			see = append(see, manualName(c)+"(1)")
		}
	}
	m.line(strings.Join(append(see, "qemu-img(1)"), ", "))
	return m.w.Flush()
}

// lower makes a sentence part of another.
func lower(s string) string {
	if s == "" || len(s) > 1 && s[1] >= 'A' && s[1] <= 'Z' {
		return s
	}
	return strings.ToLower(s[:1]) + s[1:]
}

// roff writes requests and text.
type roff struct{ w *bufio.Writer }

// roffText makes text safe: nothing in it is taken for a request, and minus signs can be copied and pasted.
var roffText = strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`, "^", `\(ha`, "~", `\(ti`, "`", `\(ga`)

func escapeRoff(s string) string {
	s = roffText.Replace(s)
	if strings.HasPrefix(s, ".") {
		s = `\&` + s
	}
	return s
}

func bold(s string) string { return `\fB` + escapeRoff(s) + `\fP` }

func (m *roff) macro(name string, args ...string) {
	_, _ = m.w.WriteString(name)
	for _, a := range args {
		fmt.Fprintf(m.w, ` "%s"`, strings.ReplaceAll(escapeRoff(a), `"`, `\(dq`))
	}
	_ = m.w.WriteByte('\n')
}

func (m *roff) section(name string) { m.macro(".SH", name) }

func (m *roff) line(s string) { fmt.Fprintln(m.w, escapeRoff(s)) }

// item writes a term, which is escaped already, and what it means.
func (m *roff) item(term, meaning string) {
	fmt.Fprintf(m.w, ".TP\n%s\n", term)
	m.line(meaning)
}

// text writes paragraphs. Lines that begin with a space, and what continues them, stay as they are.
func (m *roff) text(s string) {
	for _, p := range strings.Split(strings.TrimSpace(s), "\n\n") {
		lines := strings.Split(p, "\n")
		var plain []string
		for len(lines) > 0 && !strings.HasPrefix(lines[0], " ") {
			plain, lines = append(plain, lines[0]), lines[1:]
		}
		fmt.Fprintln(m.w, ".PP")
		for _, l := range plain {
			m.line(l)
		}
		if len(lines) > 0 {
			m.literal(lines)
		}
	}
}

// literal writes lines as they are.
func (m *roff) literal(lines []string) {
	fmt.Fprintln(m.w, ".PP\n.RS 2\n.nf")
	for _, l := range lines {
		m.line(strings.TrimPrefix(l, "  "))
	}
	fmt.Fprintln(m.w, ".fi\n.RE")
}

// flags writes a section about flags, if there are any.
func (m *roff) flags(title string, set *pflag.FlagSet) {
	if !set.HasAvailableFlags() {
		return
	}
	m.section(title)
	set.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		arg, usage := pflag.UnquoteUsage(f)
		term := ""
		if f.Shorthand != "" {
			term = bold("-"+f.Shorthand) + ", "
		}
		term += bold("--" + f.Name)
		if arg != "" && f.Value.Type() != "bool" && f.NoOptDefVal == "" {
			term += ` \fI` + escapeRoff(arg) + `\fP`
		}
		switch f.DefValue {
		case "", "false", "0", "[]", "0s":
		default:
			usage += " (default: " + f.DefValue + ")"
		}
		m.item(term, usage)
	})
}
