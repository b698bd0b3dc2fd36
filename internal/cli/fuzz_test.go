package cli

import (
	"bytes"
	"context"
	"maps"
	"strings"
	"testing"

	"github.com/droverproject/drover/block"
)

// joinOptions is the inverse of splitOptions.
func joinOptions(parts []string) string {
	escaped := make([]string, len(parts))
	for i, p := range parts {
		escaped[i] = strings.ReplaceAll(p, ",", ",,")
	}
	return strings.Join(escaped, ",")
}

func FuzzSplitOptions(f *testing.F) {
	for _, s := range []string{"", ",", ",,", ",,,", ",,,,", "a=b", "a=b,c=d", "a=b,,c,d=e", "a,,,b", "help", "?", "a=,=b", "\x00,\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		parts := splitOptions(text)
		if joined := joinOptions(parts); joined != text {
			t.Errorf("%q is cut into %q, which together are %q", text, parts, joined)
		}
	})
}

// FuzzCreateOptions: the options of an image are understood, or refused in words, and what create reports of them means
// the same when it is given again.
func FuzzCreateOptions(f *testing.F) {
	for _, s := range []string{
		"cluster_size=65536", "cluster_size=1k,size=10G", "cluster_size=3000", "cluster_size=0x200", "cluster_size=8E", "size=1.5T",
		"compat=v2", "compat=1.1,lazy_refcounts=on", "compat=0.10,lazy_refcounts", "refcount_bits=1", "refcount_bits=0x40", "refcount_bits=3",
		"refcount_bits=99999999999999999999", "extended_l2=on,cluster_size=512", "extended_l2=yes", "preallocation=metadata",
		"preallocation=none", "compression_type=zstd", "compression_type=lz4", "backing_file=a,,b,backing_fmt=raw", "backing_fmt=raw",
		"encrypt.format=luks", "encryption=on", "data_file=/dev/sda", "=", "=on", "help", "size", "size=", "a=b=c", "cluster_size=-1",
	} {
		f.Add("qcow2", s)
		f.Add("raw", s)
	}
	f.Fuzz(func(t *testing.T, format, text string) {
		known, ok := map[string][]createOption{"raw": rawOptions, "qcow2": qcow2Options}[format]
		if !ok {
			return
		}
		c := creator{app: &app{}, format: format, file: "image", optionTexts: []string{text}}
		if err := c.parseOptions(known); err != nil {
			mustSay(t, text, err)
			return
		}
		again := creator{app: c.app, format: format, file: "image"}
		for key, value := range c.options {
			again.optionTexts = append(again.optionTexts, joinOptions([]string{key + "=" + value}))
		}
		if err := again.parseOptions(known); err != nil || !maps.Equal(c.options, again.options) {
			t.Errorf("%q means %q, and that means %q (%v)", text, c.options, again.options, err)
		}
		if err := c.backingOptions(); err != nil {
			mustSay(t, text, err)
			return
		}
		if format != "qcow2" {
			return
		}
		o, err := c.qcow2Options()
		if err == nil {
			err = o.Validate()
		}
		if err != nil {
			mustSay(t, text, err)
			return
		}
		if o.ClusterSize < 512 || o.ClusterSize > 2<<20 || o.RefcountBits < 1 || o.RefcountBits > 64 || o.Size < 0 {
			t.Errorf("%q is taken for %+v", text, o)
		}
	})
}

func mustSay(t *testing.T, text string, err error) {
	t.Helper()
	if strings.TrimSpace(err.Error()) == "" {
		t.Errorf("%q is refused without a word", text)
	}
}

// FuzzImageOpts: --image-opts names an image, or is refused; nothing that it says loosens the policy.
func FuzzImageOpts(f *testing.F) {
	for _, s := range []string{
		"driver=qcow2,file.filename=a", "a", "file=a,driver=raw", "driver=qcow2,file.driver=file,file.filename=a,,b", "driver=qcow2",
		"file.driver=nbd,file.host=x", "driver=file,filename=a", "driver=qcow2,file.filename=json:{}", "backing.file.filename=/etc/passwd,a",
		"driver=qcow2,backing=,file.filename=a", "filename=a,filename=b", "force-share=on,filename=a", ",", "=", "", "filename=",
		"driver=qcow2,file.filename=a,l2-cache-size=1M", "driver=qcow2,file.filename=a,l2-cache-size=-1", "data-file.filename=b,filename=a",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s := source{imageOpts: true}
		if err := s.set(text); err != nil {
			mustSay(t, text, err)
			return
		}
		o := s.openOptions()
		if !o.ReadOnly || o.NoLock || o.Backing != nil || o.DataFile != "" {
			t.Errorf("%q opens with %+v", text, o)
		}
		ref := block.Ref{Kind: block.RefBacking, Name: "/canary", Path: "/canary", Image: "dir/image", Top: "dir/image"}
		if grant, err := o.Policy.Allow(t.Context(), ref); err == nil {
			t.Errorf("%q has the policy grant %+v", text, grant)
		}
		again := source{imageOpts: true}
		var parts []string
		for key, value := range s.node {
			if key == "" || strings.ContainsAny(key, ",=") {
				return // this has no second spelling
			}
			parts = append(parts, key+"="+value)
		}
		if err := again.set(joinOptions(parts)); err != nil || !maps.Equal(again.node, s.node) {
			t.Errorf("%q means %q, and that means %q (%v)", text, s.node, again.node, err)
		}
	})
}

// FuzzExport: NAME=IMAGE is taken apart without loss.
func FuzzExport(f *testing.F) {
	for _, s := range []string{"a=b", "=b", "a=", "a", "", "a=b=c", "\x00=x", "a=json:{}", "a=nbd://x", strings.Repeat("n", 5000) + "=x", "é=\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s := server{app: &app{out: &bytes.Buffer{}, err: &bytes.Buffer{}}, manager: new(manager), exports: []string{text}}
		config, err := s.config(nil)
		if err != nil {
			mustSay(t, text, err)
			return
		}
		if n := len(config.Exports); n != 1 {
			t.Fatalf("%q makes %d exports", text, n)
		}
		e := config.Exports[0]
		if e.Name+"="+e.Image != text || e.Image == "" || strings.Contains(e.Name, "=") {
			t.Errorf("%q is export %q of image %q", text, e.Name, e.Image)
		}
	})
}

// FuzzArguments: whatever the arguments of a command that reads, it ends with a code of its own and says why. The
// arguments stand in lines; those that could name a file outside the test's folder are left out.
func FuzzArguments(f *testing.F) {
	for _, s := range []string{
		"info\nimage", "map\n--output=json\nimage", "check\nimage", "map\n-s\n1M\n-l\n0x10\nimage", "info\n--output\nxml\nimage",
		"info\n--backing-chain\nimage", "info\n--image-opts\ndriver=qcow2,file.filename=image", "map\n-f\nraw\nimage", "map\n-s\n-1\nimage",
		"check\n-r\nall\nimage", "info\n-U\n-f\nqcow2\n--\nimage", "info", "help\ninfo", "version", "--version", "-h", "nonsense", "", "info\n",
		"map\n--start-offset=9223372036854775807\nimage", "check\n--output=json\n-q\nimage", "info\n-Uf\nqcow2\nimage",
		"info\n--allow-path\n\nimage", "map\n--max-length=0\nimage",
	} {
		f.Add(s)
	}
	dir := f.TempDir()
	f.Chdir(dir)
	var out, errs bytes.Buffer
	if code := Run(context.Background(), []string{"create", "-q", "-f", "qcow2", "image", "1M"}, &out, &errs); code != 0 {
		f.Fatal(errs.String())
	}
	f.Fuzz(func(t *testing.T, text string) {
		args := strings.Split(text, "\n")
		switch args[0] {
		case "info", "map", "check", "version", "help":
		default:
			return // it might write, or serve for ever
		}
		if strings.ContainsAny(text, "/") || strings.Contains(text, "..") {
			return
		}
		var out, errs bytes.Buffer
		code := Run(t.Context(), args, &out, &errs)
		switch {
		case code < 0 || code > 3 && code != 63:
			t.Errorf("drover %q ends with code %d", args, code)
		case code == 1 && !strings.HasPrefix(errs.String(), program+": "):
			t.Errorf("drover %q fails and says %q", args, errs.String())
		}
	})
}
