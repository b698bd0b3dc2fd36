package block

//lint:file-ignore ST1005 the errors about options say what QEMU says of them

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Options describe a node: a disk, or something below one, by the names that QEMU gives its options. The options of a
// child begin with the child's name and a dot: "file.filename", "backing.driver".
type Options map[string]string

// Null is the value of an option that is given as JSON's null: "backing" without a backing file.
const Null = "\x00null"

// maxOptionsDepth bounds how deep a description may be nested.
const maxOptionsDepth = 64

// ParseOptions reads a description from the form NAME=VALUE,NAME=VALUE, in which two commas stand for one in a value.
// What comes first may lack a name, which is then "file". warn, if not nil, is told of forms that QEMU warns of.
func ParseOptions(text string, warn func(string)) Options {
	o := make(Options)
	for first := true; text != ""; first = false {
		name, rest, hasValue := cutOptionName(text)
		if !hasValue && first {
			o["file"], text = cutOptionValue(text)
			continue
		}
		if !hasValue {
			value := "on"
			if short, ok := strings.CutPrefix(name, "no"); ok {
				name, value = short, "off"
			}
			if warn != nil && name != "" {
				warn(fmt.Sprintf("short-form boolean option '%s' deprecated\nPlease use %s=%s instead", name, name, value))
			}
			if name != "" {
				o[name] = value
			}
			text = rest
			continue
		}
		o[name], text = cutOptionValue(rest)
	}
	return o
}

// cutOptionName cuts text behind its first '=' or ','.
func cutOptionName(text string) (name, rest string, hasValue bool) {
	i := strings.IndexAny(text, "=,")
	if i < 0 {
		return text, "", false
	}
	return text[:i], text[i+1:], text[i] == '='
}

// cutOptionValue cuts text at its first single comma.
func cutOptionValue(text string) (value, rest string) {
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] == ',' {
			if i+1 == len(text) || text[i+1] != ',' {
				return b.String(), text[i+1:]
			}
			i++
		}
		b.WriteByte(text[i])
	}
	return b.String(), ""
}

// ParseJSON reads a description from a JSON object, nested or with dots in its names. As in QEMU, strings may stand in
// single quotes.
func ParseJSON(text string) (Options, error) {
	dec := json.NewDecoder(strings.NewReader(doubleQuoted(text)))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		return nil, fmt.Errorf("Could not parse the JSON options: %s", jsonReason(err))
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("Could not parse the JSON options: JSON parse error, expecting value")
	}
	top, ok := v.(map[string]any)
	if !ok {
		return nil, errors.New("Invalid JSON object given")
	}
	o := make(Options)
	for name, value := range top {
		if err := o.flatten(name, value, 0); err != nil {
			return nil, err
		}
	}
	return o, nil
}

func jsonReason(err error) string {
	if errors.Is(err, io.EOF) {
		return "Expecting a JSON value"
	}
	var syntax *json.SyntaxError
	if errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.As(err, &syntax) && strings.Contains(syntax.Error(), "unexpected end") {
		return "JSON parse error, premature EOI"
	}
	return fmt.Sprintf("JSON parse error, %v", err)
}

// doubleQuoted turns the strings in single quotes of a JSON text into proper ones.
func doubleQuoted(text string) string {
	if !strings.Contains(text, "'") {
		return text
	}
	var b strings.Builder
	quote := byte(0)
	for i := 0; i < len(text); i++ {
		c := text[i]
		switch {
		case quote != 0 && c == '\\' && i+1 < len(text):
			i++
			if text[i] != '\'' {
				b.WriteByte('\\')
			}
			b.WriteByte(text[i])
		case quote == '\'' && c == '"':
			b.WriteString(`\"`)
		case quote == 0 && (c == '"' || c == '\''):
			quote = c
			b.WriteByte('"')
		case c == quote:
			quote = 0
			b.WriteByte('"')
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

func (o Options) flatten(name string, v any, depth int) error {
	if depth > maxOptionsDepth {
		return errors.New("Could not parse the JSON options: JSON parse error, nesting depth limit exceeded")
	}
	switch v := v.(type) {
	case nil:
		o[name] = Null
	case string:
		o[name] = v
	case json.Number:
		o[name] = v.String()
	case bool:
		o[name] = map[bool]string{true: "on", false: "off"}[v]
	case []any:
		for i, e := range v {
			if err := o.flatten(name+"."+strconv.Itoa(i), e, depth+1); err != nil {
				return err
			}
		}
	case map[string]any:
		for key, e := range v {
			if err := o.flatten(name+"."+key, e, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// Sub returns the options of a child.
func (o Options) Sub(child string) Options {
	sub := make(Options)
	for name, value := range o {
		if rest, ok := strings.CutPrefix(name, child+"."); ok {
			sub[rest] = value
		}
	}
	return sub
}

// AddSub adds the options of a child. Those that are there already stay.
func (o Options) AddSub(child string, sub Options) {
	for name, value := range sub {
		if _, ok := o[child+"."+name]; !ok {
			o[child+"."+name] = value
		}
	}
}

// take removes an option and returns it.
func (o Options) take(name string) (string, bool) {
	value, ok := o[name]
	delete(o, name)
	return value, ok
}

// takeSub removes the options of a child and returns them. ref is the option of the child's own name.
func (o Options) takeSub(child string) (sub Options, ref string, hasRef bool) {
	sub = o.Sub(child)
	for name := range sub {
		delete(o, child+"."+name)
	}
	ref, hasRef = o.take(child)
	return sub, ref, hasRef
}

// names returns the names of the options in order.
func (o Options) names() []string { return slices.Sorted(maps.Keys(o)) }

// LeafPath returns the file at the bottom of a node, to which the names in an image are relative, or "" if there is none.
func (o Options) LeafPath() string {
	for range maxOptionsDepth {
		driver := o["driver"]
		if driver == "file" || driver == "host_device" || driver == "" && o["filename"] != "" {
			return o["filename"]
		}
		next := Options(nil)
		for _, child := range []string{"file", "image"} {
			if sub := o.Sub(child); len(sub) > 0 {
				next = sub
				break
			}
		}
		if next == nil {
			return ""
		}
		o = next
	}
	return ""
}

// weakOptions say how a node is used, not what it is: they are not part of its name.
var weakOptions = []string{
	"node-name", "read-only", "auto-read-only", "cache.direct", "cache.no-flush", "discard", "detect-zeroes", "force-share",
	"locking", "aio", "aio-max-batch", "drop-cache", "x-check-cache-dropped", "pr-manager", "reconnect-delay", "open-timeout",
}

// Describe returns a name for the node: that of its file if that says everything, and else all of it as json:{...}.
func (o Options) Describe() string {
	if name, ok := o.plainName(); ok {
		return name
	}
	var b bytes.Buffer
	b.WriteString("json:")
	o.writeJSON(&b)
	return b.String()
}

// plainName returns the name of a node that has one without braces.
func (o Options) plainName() (string, bool) {
	driver := o["driver"]
	if d, ok := lookupDriver(driver); ok && d.NodeName != nil {
		return d.NodeName(o)
	}
	if driver == "file" || driver == "host_device" || driver == "" && o["filename"] != "" {
		return o["filename"], true
	}
	if _, isDriver := lookupDriver(driver); isDriver {
		return "", false
	}
	for _, name := range o.names() {
		child, _, _ := strings.Cut(name, ".")
		if child == "backing" || child == "data-file" || name == "offset" || name == "size" || name == "encrypt.key-secret" {
			return "", false
		}
	}
	file := o.Sub("file")
	if len(file) == 0 {
		return "", false
	}
	return file.plainName()
}

func (o Options) writeJSON(b *bytes.Buffer) {
	b.WriteByte('{')
	if o["driver"] == "" && o["filename"] != "" {
		o = maps.Clone(o)
		o["driver"] = "file"
	}
	first := true
	begin := func(name string) {
		if !first {
			b.WriteString(", ")
		}
		first = false
		b.WriteString(quoteJSON(name) + ": ")
	}
	done := make(map[string]bool)
	for _, name := range o.names() {
		if slices.Contains(weakOptions, name) {
			continue
		}
		child, _, nested := strings.Cut(name, ".")
		switch {
		case o[name] == Null:
			begin(name)
			b.WriteString("null")
		case !nested:
			begin(name)
			b.WriteString(quoteJSON(o[name]))
		case child == "file" || child == "backing" || child == "data-file" || child == "image" || child == "test" || child == "raw" ||
			child == "server":
			if !done[child] {
				done[child] = true
				begin(child)
				o.Sub(child).writeJSON(b)
			}
		default:
			begin(name)
			b.WriteString(quoteJSON(o[name]))
		}
	}
	b.WriteByte('}')
}

func quoteJSON(s string) string {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(s); err != nil {
		return strconv.Quote(s)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// ParseName returns the description of what a name given by the user stands for: a file, an address behind a protocol's
// prefix, or a description behind "json:". format, if not "", is its driver.
func ParseName(name, format string) (Options, error) {
	if text, ok := strings.CutPrefix(name, "json:"); ok {
		o, err := ParseJSON(text)
		if err == nil && format != "" {
			o["driver"] = format
		}
		return o, err
	}
	file, err := parseFileName(name)
	if err != nil {
		return nil, err
	}
	o := make(Options)
	if _, ok := lookupDriver(format); ok {
		file["driver"] = format
		return file, nil
	}
	if format != "" {
		o["driver"] = format
	}
	o.AddSub("file", file)
	return o, nil
}

// ParseFileName is ParseName for what lies below a format.
func ParseFileName(name string) (Options, error) {
	if text, ok := strings.CutPrefix(name, "json:"); ok {
		return ParseJSON(text)
	}
	return parseFileName(name)
}

func parseFileName(name string) (Options, error) {
	prefix, rest, plain := SplitProtocol(name)
	if plain {
		path, err := PlainName(name)
		if err != nil {
			return nil, err
		}
		_ = rest
		return Options{"driver": "file", "filename": path}, nil
	}
	d, ok := driverByPrefix(prefix)
	if !ok {
		return nil, fmt.Errorf("%q: %w: %q (for a file of this name write %q)", name, ErrProtocol, prefix, "./"+name)
	}
	if d.ParseName == nil {
		return Options{"driver": d.Name, "filename": name}, nil
	}
	o, err := d.ParseName(name)
	if err != nil {
		return nil, err
	}
	o["driver"] = d.Name
	return o, nil
}
