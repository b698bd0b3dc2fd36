package cli

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// TestManuals writes a page for every command that help shows, and has groff read them.
func TestManuals(t *testing.T) {
	dir := t.TempDir()
	mustDrover(t, "man", dir)
	root := (&app{name: program, out: new(bytes.Buffer), err: new(bytes.Buffer)}).rootCommand(allMakers())
	var want []string
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		want = append(want, manualName(c)+".1")
		for _, sub := range c.Commands() {
			if sub.IsAvailableCommand() {
				walk(sub)
			}
		}
	}
	walk(root)
	pages, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pages {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Base(p)
		if !slices.Contains(want, name) {
			t.Errorf("%s is nobody's page", name)
		}
		for _, section := range []string{".TH \"DROVER", ".SH \"NAME\"", ".SH \"SYNOPSIS\"", ".SH \"DESCRIPTION\"", ".SH \"SEE ALSO\""} {
			if !strings.Contains(string(b), section) {
				t.Errorf("%s has no %s", name, section)
			}
		}
		if _, err := exec.LookPath("groff"); err != nil {
			continue
		}
		out, err := exec.Command("groff", "-man", "-ww", "-Tascii", "-z", p).CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
	if len(pages) != len(want) {
		t.Errorf("%d pages, want %d", len(pages), len(want))
	}
	for _, args := range [][]string{{"man"}, {"man", filepath.Join(dir, "missing")}} {
		if o := drover(t, args...); o.code != 1 || o.stderr == "" {
			t.Errorf("%v: %+v", args, o)
		}
	}
}

// TestRoffEscapes: what looks like a request is text.
func TestRoffEscapes(t *testing.T) {
	for in, want := range map[string]string{".x": `\&.x`, "'x": `\(aqx`, `a\b`: `a\eb`, "--long": `\-\-long`, "plain": "plain"} {
		if got := escapeRoff(in); got != want {
			t.Errorf("%q is %q, want %q", in, got, want)
		}
	}
}

func TestCompletion(t *testing.T) {
	holey(t)
	for _, c := range []struct {
		line string
		want []string
	}{
		{"sna", []string{"snapshot"}},
		{"compa", []string{"compact", "compare"}},
		{"convert -O ", []string{"qcow2", "raw"}},
		{"info --output=", []string{"human", "json"}},
		{"create -f qcow2 -o lazy_refcounts=on,refc", []string{"lazy_refcounts=on,refcount_bits="}},
		{"snapshot disk -a ", []string{"s"}},
		{"snapshot missing -a ", nil},
		{"diff disk@", []string{"disk@s"}},
		{"check -r ", []string{"leaks", "all"}},
		{"completion ", []string{"bash", "zsh", "fish", "powershell"}},
	} {
		out := mustDrover(t, append([]string{"__complete"}, strings.Split(c.line, " ")...)...)
		for _, w := range c.want {
			if !strings.Contains(out, w+"\n") && !strings.Contains(out, w+"\t") {
				t.Errorf("%q is completed by %q, want %q among it", c.line, out, w)
			}
		}
		if c.want == nil && !strings.HasPrefix(out, ":") {
			t.Errorf("%q is completed by %q", c.line, out)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		script := mustDrover(t, "completion", shell)
		if !strings.Contains(script, "drover") || !strings.Contains(script, "__complete") {
			t.Errorf("%s: %.200s", shell, script)
		}
		if _, err := exec.LookPath("bash"); shell != "bash" || err != nil {
			continue
		}
		cmd := exec.Command("bash", "-n")
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
	for _, args := range [][]string{{"completion"}, {"completion", "tcsh"}} {
		if o := drover(t, args...); o.code != 1 || o.stderr == "" {
			t.Errorf("%v: %+v", args, o)
		}
	}
}
