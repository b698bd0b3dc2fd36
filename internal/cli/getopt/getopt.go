// Package getopt reads command lines as getopt_long of the GNU C library does, which the programs that drover stands in
// for use: options and arguments in any order until "--", short options in one word, long ones shortened as far as they
// stay clear, and the library's own words about what is wrong.
package getopt

import (
	"fmt"
	"strings"
)

// Arg says whether an option has an argument.
type Arg int

// An option's argument may be missing, has to be there, or may be there: then only in the same word.
const (
	None Arg = iota
	Required
	Optional
)

// Option is an option of a program. Options that mean the same share their ID.
type Option struct {
	ID    rune   // what Parse reports; for an option with a short form, that
	Short bool   // ID is a letter that stands for the option
	Long  string // without the dashes, "" for none
	Arg   Arg
}

// Error is a mistake in a command line, in the library's words, without the program's name in front.
type Error struct {
	Text    string
	Word    string // of the command line, in which the mistake is
	Missing bool   // an option lacks its argument
}

// Error implements error.
func (e *Error) Error() string { return e.Text }

func errorf(format string, args ...any) error { return &Error{Text: fmt.Sprintf(format, args...)} }

func missing(format string, args ...any) error {
	return &Error{Text: fmt.Sprintf(format, args...), Missing: true}
}

// Parse calls set for each option in the order of the command line, until it fails, and returns the arguments that
// belong to no option. An error is that of set, or an *Error.
func Parse(options []Option, args []string, set func(id rune, value string) error) (rest []string, err error) {
	return parse(&parser{options: options, args: args, set: set})
}

// ParseLeading is Parse that ends at the first argument that belongs to no option: it and all after it are the rest.
func ParseLeading(options []Option, args []string, set func(id rune, value string) error) (rest []string, err error) {
	return parse(&parser{options: options, args: args, set: set, leading: true})
}

func parse(p *parser) (rest []string, err error) {
	for len(p.args) > 0 {
		word := p.next()
		switch {
		case word == "--":
			return append(rest, p.args...), nil
		case p.leading && (len(word) < 2 || word[0] != '-'):
			return append([]string{word}, p.args...), nil
		case strings.HasPrefix(word, "--"):
			err = p.long(word[2:])
		case len(word) > 1 && word[0] == '-':
			err = p.short(word[1:])
		default:
			rest = append(rest, word)
		}
		if err != nil {
			if mistake, ok := err.(*Error); ok && mistake.Word == "" {
				mistake.Word = word
			}
			return nil, err
		}
	}
	return rest, nil
}

type parser struct {
	options []Option
	args    []string // not read yet
	set     func(rune, string) error
	leading bool // the first argument ends the options
}

func (p *parser) next() string {
	word := p.args[0]
	p.args = p.args[1:]
	return word
}

// short takes a word of short options, the last of which may have an argument.
func (p *parser) short(word string) error {
	for i, letter := range word {
		o := p.byLetter(letter)
		if o == nil {
			return errorf("invalid option -- '%c'", letter)
		}
		if o.Arg == None {
			if err := p.set(o.ID, ""); err != nil {
				return err
			}
			continue
		}
		value := word[i+len(string(letter)):]
		if value == "" && o.Arg == Required {
			if len(p.args) == 0 {
				return missing("option requires an argument -- '%c'", letter)
			}
			value = p.next()
		}
		return p.set(o.ID, value)
	}
	return nil
}

func (p *parser) byLetter(letter rune) *Option {
	for i := range p.options {
		if o := &p.options[i]; o.Short && o.ID == letter {
			return o
		}
	}
	return nil
}

// long takes a long option, without its dashes.
func (p *parser) long(word string) error {
	name, value, given := strings.Cut(word, "=")
	o, err := p.byName(name, word)
	if err != nil {
		return err
	}
	switch {
	case given && o.Arg == None:
		return errorf("option '--%s' doesn't allow an argument", o.Long)
	case !given && o.Arg == Required:
		if len(p.args) == 0 {
			return missing("option '--%s' requires an argument", o.Long)
		}
		value = p.next()
	}
	return p.set(o.ID, value)
}

// byName finds the option that has a name, or the one whose name begins with it. Names that mean the same do not compete.
// word is for messages.
func (p *parser) byName(name, word string) (*Option, error) {
	var found []*Option
	same := true
	for i := range p.options {
		o := &p.options[i]
		if o.Long == "" || !strings.HasPrefix(o.Long, name) {
			continue
		}
		if o.Long == name {
			return o, nil
		}
		if len(found) > 0 && (found[0].ID != o.ID || found[0].Arg != o.Arg) {
			same = false
		}
		found = append(found, o)
	}
	switch {
	case len(found) == 0:
		return nil, errorf("unrecognized option '--%s'", word)
	case same:
		return found[0], nil
	}
	var list strings.Builder
	for _, o := range found {
		fmt.Fprintf(&list, " '--%s'", o.Long)
	}
	return nil, errorf("option '--%s' is ambiguous; possibilities:%s", word, list.String())
}
