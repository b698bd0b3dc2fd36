package block_test

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/block"
)

func TestParseOptions(t *testing.T) {
	for text, want := range map[string]block.Options{
		"":                            {},
		"a=b":                         {"a": "b"},
		"a=b,c=d":                     {"a": "b", "c": "d"},
		"a=b,,c,d=":                   {"a": "b,c", "d": ""},
		"name":                        {"file": "name"},
		"na,,me,a=b":                  {"file": "na,me", "a": "b"},
		"a=b,c":                       {"a": "b", "c": "on"},
		"a=b,noc":                     {"a": "b", "c": "off"},
		"a=b=c":                       {"a": "b=c"},
		"a=1,a=2":                     {"a": "2"},
		"a=,,,b=c":                    {"a": ",", "b": "c"},
		"file.filename=x,driver=raw,": {"file.filename": "x", "driver": "raw"},
	} {
		if got := block.ParseOptions(text, nil); !maps.Equal(got, want) {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	var said []string
	block.ParseOptions("a=b,c", func(s string) { said = append(said, s) })
	if len(said) != 1 || said[0] != "short-form boolean option 'c' deprecated\nPlease use c=on instead" {
		t.Errorf("warned of %q", said)
	}
}

func TestParseJSON(t *testing.T) {
	for text, want := range map[string]block.Options{
		`{}`: {},
		`{"a": "b", "c": {"d": true, "e": [1, {"f": false}]}, "g.h": null}`: {
			"a": "b", "c.d": "on", "c.e.0": "1", "c.e.1.f": "off", "g.h": block.Null,
		},
		`{'a': 'it\'s "quoted"', "b": "it's"}`: {"a": `it's "quoted"`, "b": "it's"},
		`{"n": 18446744073709551615}`:          {"n": "18446744073709551615"},
	} {
		got, err := block.ParseJSON(text)
		if err != nil || !maps.Equal(got, want) {
			t.Errorf("%s: %q, %v; want %q", text, got, err, want)
		}
	}
	for text, want := range map[string]string{
		"": "Expecting a JSON value", `{"a":`: "premature EOI", `[1]`: "Invalid JSON object given", `{} {}`: "JSON parse error",
		`{'a`: "premature EOI", strings.Repeat(`{"a":`, 100) + "1" + strings.Repeat("}", 100): "nesting depth",
	} {
		if _, err := block.ParseJSON(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// FuzzParseJSON: what a text means can be written down and means the same again.
func FuzzParseJSON(f *testing.F) {
	for _, s := range []string{`{"driver":"qcow2","file":{"filename":"a"}}`, `{'a':'\''}`, `{"backing":null}`, `{"a":[1,[2]]}`, "{", "1", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		o, err := block.ParseJSON(text)
		if err != nil {
			return
		}
		_ = o.LeafPath()
		if name, ok := strings.CutPrefix(o.Describe(), "json:"); ok {
			if _, err := block.ParseJSON(name); err != nil {
				t.Errorf("%q is described as %q: %v", text, name, err)
			}
		}
	})
}

// FuzzParseOptions: parsing ends, whatever the text.
func FuzzParseOptions(f *testing.F) {
	for _, s := range []string{"a=b,c=d", "a,,b", ",", "=", "a=,,,,", "no,a=b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		o := block.ParseOptions(text, nil)
		n := 0
		for name, value := range o {
			n += len(name) + len(value)
		}
		if n > len(text)+len("file")+3*strings.Count(text, ",") {
			t.Errorf("%q has become %q", text, o)
		}
	})
}

func TestDescribe(t *testing.T) {
	for _, c := range []struct {
		o    block.Options
		want string
	}{
		{block.Options{"driver": "file", "filename": "a"}, "a"},
		{block.Options{"filename": "a"}, "a"},
		{block.Options{"driver": "raw", "file.filename": "a", "read-only": "on", "file.locking": "off"}, "a"},
		{block.Options{"file.driver": "file", "file.filename": "a"}, "a"},
		{
			block.Options{"driver": "raw", "file.filename": "a\"b", "offset": "512"},
			`json:{"driver": "raw", "file": {"driver": "file", "filename": "a\"b"}, "offset": "512"}`,
		},
		{
			block.Options{"driver": "raw", "file.filename": "a", "backing": block.Null},
			`json:{"backing": null, "driver": "raw", "file": {"driver": "file", "filename": "a"}}`,
		},
	} {
		if got := c.o.Describe(); got != c.want {
			t.Errorf("%q is called %s, want %s", c.o, got, c.want)
		}
	}
}

func TestNodes(t *testing.T) {
	dir := t.TempDir()
	base, other, top := filepath.Join(dir, "base"), filepath.Join(dir, "other"), filepath.Join(dir, "top")
	for name, text := range map[string]string{base: strings.Repeat("b", 512), other: strings.Repeat("o", 1024), top: linkMagic + "base\nraw\n"} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name string
		node block.Options
		o    block.OpenOptions
		want string // of an error
		deep int    // images below
	}{
		{"as named", block.Options{"driver": "link", "file.filename": top}, block.OpenOptions{}, "", 1},
		{"probed", block.Options{"file.filename": top}, block.OpenOptions{AllowProbe: true}, "", 1},
		{"without backing", block.Options{"driver": "link", "file.filename": top, "backing": block.Null}, block.OpenOptions{}, "", 0},
		{"a file's bytes", block.Options{"driver": "file", "filename": top}, block.OpenOptions{}, "", 0},
		{
			"another backing", block.Options{"driver": "link", "file.filename": top, "backing.driver": "link", "backing.file.filename": top, "backing.backing": ""},
			block.OpenOptions{}, "stands on itself", 0,
		},
		{
			"its options", block.Options{"driver": "link", "file.filename": top, "backing.offset": "512", "backing.driver": "raw"},
			block.OpenOptions{}, "", 1,
		},
		{
			"bad options below", block.Options{"driver": "link", "file.filename": top, "backing.offset": "1024"}, block.OpenOptions{},
			"Offset (1024) cannot be greater than size", 0,
		},
		{"a node by name", block.Options{"driver": "link", "file": "x"}, block.OpenOptions{}, "Cannot find device='x' nor node-name='x'", 0},
		{"no file", block.Options{"driver": "link"}, block.OpenOptions{}, `A block device must be specified for "file"`, 0},
		{"nothing", block.Options{}, block.OpenOptions{}, "Must specify either driver or file", 0},
		{"no name", block.Options{"driver": "raw", "file.driver": "file"}, block.OpenOptions{}, "The 'file' block driver requires a file name", 0},
		{"unknown driver", block.Options{"driver": "x", "file.filename": top}, block.OpenOptions{}, "unknown image format", 0},
		{"unknown option", block.Options{"driver": "raw", "file.filename": top, "x": "1"}, block.OpenOptions{}, "Block format 'raw' does not support the option 'x'", 0},
		{"unknown option of a file", block.Options{"driver": "raw", "file.filename": top, "file.x": "1"}, block.OpenOptions{}, "Block protocol 'file' doesn't support the option 'x'", 0},
		{"backing of raw", block.Options{"driver": "raw", "file.filename": top, "backing.driver": "raw"}, block.OpenOptions{}, "does not support the option 'backing'", 0},
		{"read-only", block.Options{"driver": "raw", "file.filename": top, "read-only": "on"}, block.OpenOptions{}, "Block node is read-only", 0},
		{"shared for writing", block.Options{"driver": "raw", "file.filename": top, "force-share": "on"}, block.OpenOptions{}, "force-share=on can only be used", 0},
		{"not a device", block.Options{"driver": "host_device", "filename": top}, block.OpenOptions{ReadOnly: true}, "to be either a character or block device", 0},
	} {
		o := c.o
		o.Node, o.Policy, o.NoLock = c.node, block.BelowImageFolder(), false
		dev, err := block.Open(t.Context(), "node", o)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		if err != nil {
			continue
		}
		if got := depth(dev); got != c.deep {
			t.Errorf("%s: %d images below, want %d", c.name, got, c.deep)
		}
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestNodesAndPolicies: what an image says of other files is judged, however the image was described.
func TestNodesAndPolicies(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(t.TempDir(), "outside")
	top := filepath.Join(dir, "top")
	for _, name := range []string{
		outside, "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"" + outside + "\"}}", "file.filename=" + outside + "/..",
		"nbd://localhost/x", "nbd:unix:/x", "blkdebug::" + outside, "null-co://",
	} {
		if err := os.WriteFile(top, []byte(linkMagic+name+"\nraw\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, node := range []block.Options{
			{"driver": "link", "file.filename": top},
			{"driver": "link", "file.filename": top, "backing.read-only": "on", "backing.discard": "unmap"},
		} {
			_, err := block.Open(t.Context(), "x", block.OpenOptions{Node: node, Policy: block.BelowImageFolder(), ReadOnly: true})
			var refused *block.PolicyError
			if name == "file.filename="+outside+"/.." {
				if err == nil {
					t.Errorf("%q is opened", name)
				}
				continue // a plain name in the folder, of a file that is not there
			}
			if !errors.As(err, &refused) {
				t.Errorf("%q: %v, want a refusal", name, err)
			}
		}
	}
	if _, err := block.BelowImageFolder().Allow(t.Context(), block.Ref{Kind: block.RefBacking, Name: top, Path: top}); err == nil {
		t.Error("an image that is in no folder may name a file")
	}
}
