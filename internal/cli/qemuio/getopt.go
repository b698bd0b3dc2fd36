package qemuio

import (
	"fmt"
	"io"

	"github.com/droverproject/drover/internal/cli/getopt"
)

// flags are the options that a command was given, by their letters. A letter that takes a value has one.
type flags struct {
	given map[rune]string
	rest  []string // the arguments that are no options
}

func (f *flags) has(letter rune) bool {
	_, ok := f.given[letter]
	return ok
}

// parseFlags takes the options out of a command line. spec lists the letters, each that takes a value followed by a colon.
// each, if not nil, is called for every option in turn and may end it. It reports an option that there is none of on w.
func parseFlags(w io.Writer, words []string, spec string, each func(letter rune, value string) bool) (*flags, bool) {
	f := &flags{given: make(map[rune]string)}
	var err error
	f.rest, err = getopt.Parse(options(spec), words[1:], func(letter rune, value string) error {
		f.given[letter] = value
		if each != nil && !each(letter, value) {
			return errFailed
		}
		return nil
	})
	if _, ok := err.(*getopt.Error); ok {
		fmt.Fprintf(w, "%s: %s\n", words[0], err)
	}
	return f, err == nil
}

// options are those that spec lists.
func options(spec string) []getopt.Option {
	var list []getopt.Option
	for _, letter := range spec {
		if letter == ':' {
			list[len(list)-1].Arg = getopt.Required
			continue
		}
		list = append(list, getopt.Option{ID: letter, Short: true})
	}
	return list
}
