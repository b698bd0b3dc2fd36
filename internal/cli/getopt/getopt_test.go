package getopt

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

var options = []Option{
	{ID: 'h', Short: true, Long: "help"},
	{ID: 'p', Short: true, Long: "port", Arg: Required},
	{ID: 'T', Short: true, Arg: Optional},
	{ID: 's', Short: true, Long: "snapshot"},
	{ID: 'e', Short: true, Long: "shared", Arg: Required},
	{ID: 300, Long: "opts", Arg: Optional},
	{ID: 300, Long: "optsalso", Arg: Optional},
}

func TestParse(t *testing.T) {
	for _, c := range []struct{ line, set, rest, fails string }{
		{line: "a -h b", set: "h=", rest: "a b"},
		{line: "-hs -p5 -p 6 -sp7 c", set: "h= s= p=5 p=6 s= p=7", rest: "c"},
		{line: "--port 5 --port=6 --port= --po=7", set: "p=5 p=6 p= p=7"},
		{line: "-h -- -h --port", set: "h=", rest: "-h --port"},
		{line: "- -p -", set: "p=-", rest: "-"},
		{line: "-T -Tx -T x", set: "T= T=x T=", rest: "x"},
		{line: "--opt=1 --opts --optsal=2", set: "Ĭ=1 Ĭ= Ĭ=2"},
		{line: "-p -h", set: "p=-h"},
		{line: "-y", fails: "invalid option -- 'y'"},
		{line: "-hé", set: "h=", fails: "invalid option -- 'é'"},
		{line: "-h -sp", set: "h= s=", fails: "option requires an argument -- 'p'"},
		{line: "--port", fails: "option '--port' requires an argument"},
		{line: "--po", fails: "option '--port' requires an argument"},
		{line: "--help=x", fails: "option '--help' doesn't allow an argument"},
		{line: "--nope=x", fails: "unrecognized option '--nope=x'"},
		{line: "--s", fails: "option '--s' is ambiguous; possibilities: '--snapshot' '--shared'"},
		{line: "--=x", fails: "option '--=x' is ambiguous; possibilities: '--help' '--port' '--snapshot' '--shared' '--opts' '--optsalso'"},
	} {
		t.Run(c.line, func(t *testing.T) {
			var set []string
			rest, err := Parse(options, strings.Fields(c.line), func(id rune, value string) error {
				set = append(set, string(id)+"="+value)
				return nil
			})
			var mistake *Error
			switch {
			case c.fails == "" && err != nil:
				t.Fatal(err)
			case c.fails != "" && (!errors.As(err, &mistake) || err.Error() != c.fails):
				t.Fatalf("got %v, want %s", err, c.fails)
			}
			if got := strings.Join(set, " "); got != c.set {
				t.Errorf("options %s, want %s", got, c.set)
			}
			if !slices.Equal(rest, strings.Fields(c.rest)) && err == nil {
				t.Errorf("arguments %q, want %q", rest, c.rest)
			}
		})
	}
}

// TestSetFails stops at the first option that the program refuses, as a program that exits there does.
func TestSetFails(t *testing.T) {
	refused := errors.New("refused")
	n := 0
	_, err := Parse(options, []string{"-h", "-s", "--nope"}, func(rune, string) error {
		if n++; n == 2 {
			return refused
		}
		return nil
	})
	if err != refused || n != 2 {
		t.Errorf("got %v after %d options", err, n)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("-hs -p5 --port=6 --s -- x")
	f.Fuzz(func(t *testing.T, line string) {
		args := strings.Split(line, " ")
		rest, err := Parse(options, args, func(id rune, _ string) error {
			if !slices.ContainsFunc(options, func(o Option) bool { return o.ID == id }) {
				t.Errorf("option %q does not exist", id)
			}
			return nil
		})
		if err == nil && len(rest) > len(args) {
			t.Errorf("%d arguments of %d words", len(rest), len(args))
		}
	})
}
