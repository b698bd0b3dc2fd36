package block_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/harness"
)

// Every regular file in the folder that may be reached holds this, and no other file does.
const insideMark = "inside the root"

// den is a folder with an image, surrounded by what its image must not reach.
type den struct {
	out, in string
	opens   *harness.Opens // of what must not be opened
}

func newDen(t testing.TB) *den {
	t.Helper()
	out, err := filepath.EvalSymlinks(t.TempDir())
	harness.OK(t, err)
	d := &den{out: out, in: filepath.Join(out, "root")}
	harness.OK(t, os.MkdirAll(filepath.Join(d.in, "sub"), 0o700))
	for _, name := range []string{"image", "base", "sub/base"} {
		harness.OK(t, os.WriteFile(filepath.Join(d.in, name), []byte(insideMark), 0o600))
	}
	for _, name := range []string{"canary", "root.canary"} {
		harness.OK(t, os.WriteFile(filepath.Join(out, name), []byte("must not be read"), 0o600))
	}
	for name, target := range map[string]string{
		"inside": "sub/base", "escape": "../canary", "escapedir": "..", "up": "..", "sub/up": "..", "chain": "escape", "self": "self",
		"dangling": "nothing", "absolute": filepath.Join(out, "canary"), "fds": "/proc/self/fd", "proc": "/proc/self", "zero": "/dev/zero",
	} {
		harness.OK(t, os.Symlink(target, filepath.Join(d.in, name)))
	}
	for _, name := range []string{"fifo", "sub/fifo"} {
		harness.OK(t, syscall.Mkfifo(filepath.Join(d.in, name), 0o600))
	}
	d.opens = harness.WatchOpens(t, filepath.Join(out, "canary"), filepath.Join(out, "root.canary"), filepath.Join(d.in, "fifo"),
		filepath.Join(d.in, "sub", "fifo"))
	return d
}

// FuzzName: whatever name an image stores, under the policies of servers no file is opened that is not in the root.
func FuzzName(f *testing.F) {
	for _, name := range hostileNames {
		f.Add(name)
	}
	for _, name := range []string{"absolute", "../root.canary", "$IN.canary", "../root/base"} {
		f.Add(name)
	}
	d := newDen(f)
	image := filepath.Join(d.in, "image")
	policies := map[string]block.Policy{
		"folder": block.BelowImageFolder(),
		"roots":  block.Roots([]string{d.in}),
		"any of": block.AnyOf(block.DenyAll(), block.Roots([]string{filepath.Join(d.in, "sub"), d.in})),
	}
	f.Fuzz(func(t *testing.T, name string) {
		name = strings.ReplaceAll(strings.ReplaceAll(name, "$OUT", d.out), "$IN", d.in)
		for rule, policy := range policies {
			checkGrant(t, d, rule, policy, image, name)
			file, path, err := block.OpenBackingFile(t.Context(), image, image, name, block.OpenOptions{NoLock: true, Policy: policy})
			if err == nil {
				mustBeInside(t, file, rule, name, path)
			}
			if opened := d.opens.Take(t); len(opened) > 0 {
				t.Fatalf("%s: the name %q had %q opened (%v)", rule, name, opened, err)
			}
		}
		for rule, policy := range map[string]block.Policy{"deny": block.DenyAll(), "none": nil} {
			file, _, err := block.OpenBackingFile(t.Context(), image, image, name, block.OpenOptions{NoLock: true, Policy: policy})
			if err == nil {
				mustClose(t, file)
				t.Fatalf("%s: the name %q is followed", rule, name)
			}
		}
	})
}

// checkGrant asks a policy about a name: what it grants is bound to a root.
func checkGrant(t *testing.T, d *den, rule string, policy block.Policy, image, name string) {
	t.Helper()
	protocol, rest, plain := block.SplitProtocol(name)
	ref := block.Ref{Kind: block.RefData, Name: name, Image: image, Top: image, Protocol: protocol}
	if !plain && protocol == "" {
		return // refused before a policy is asked
	}
	if plain {
		ref.Path = block.ResolveName(image, rest)
	}
	grant, err := policy.Allow(t.Context(), ref)
	var refusal *block.PolicyError
	switch {
	case err != nil && !errors.As(err, &refusal):
		t.Fatalf("%s: the refusal of %q is of type %T", rule, name, err)
	case err == nil && protocol != "":
		t.Fatalf("%s: the name %q with a protocol is granted: %+v", rule, name, grant)
	case err == nil && (!filepath.IsLocal(grant.Path) || grant.Root != d.in && grant.Root != filepath.Join(d.in, "sub")):
		t.Fatalf("%s: for %q it grants %+v, which is not bound to the root", rule, name, grant)
	}
}

func mustBeInside(t *testing.T, file storage.File, rule, name, path string) {
	t.Helper()
	defer mustClose(t, file)
	got := make([]byte, len(insideMark))
	if _, err := file.ReadAt(got, 0); err != nil && !errors.Is(err, io.EOF) || !bytes.Equal(got, []byte(insideMark)) {
		t.Fatalf("%s: the name %q has opened %q with the content %q (%v)", rule, name, path, got, err)
	}
}

// TestDenIsWatched: the fuzz test's eyes are open. Without a policy the names do lead to the canary.
func TestDenIsWatched(t *testing.T) {
	d := newDen(t)
	image := filepath.Join(d.in, "image")
	for _, name := range []string{"../canary", "escape", "absolute", "chain", "up/canary", filepath.Join(d.out, "canary")} {
		file, _, err := block.OpenBackingFile(t.Context(), image, image, name, block.OpenOptions{NoLock: true, Policy: block.AllowAll()})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		mustClose(t, file)
		if len(d.opens.Take(t)) == 0 {
			t.Errorf("%s: the opening of the canary went unseen", name)
		}
	}
	for _, name := range []string{"fifo", "zero", "fds/0"} {
		_, _, err := block.OpenBackingFile(t.Context(), image, image, name, block.OpenOptions{NoLock: true, Policy: block.BelowImageFolder()})
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v, want a refusal", name, err)
		}
	}
}
