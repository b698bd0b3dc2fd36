package cli

import (
	"bytes"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestRepairLikeQEMU repairs copies of one image with both tools. Where QEMU rebuilds all refcounts the file ends elsewhere.
func TestRepairLikeQEMU(t *testing.T) {
	images(t)
	edit(t, "base", "leaks", 0x20000+11, 3) // a refcount of 3 for a cluster that is used once
	end := regexp.MustCompile(`(?m)^(Image end offset: \d+|    "image-end-offset": \d+,)\n`)
	for _, name := range []string{"base", "raw", "leaks", "broken", "dirty", "missing", "v2", "version9"} {
		original, err := os.ReadFile(name)
		for _, mode := range []string{"leaks", "all"} {
			for _, flags := range [][]string{nil, {"--output=json"}, {"-q"}} {
				args := append(append([]string{"check", "-r", mode}, flags...), "copy")
				give := func() {
					if os.Remove("copy"); err == nil {
						put(t, "copy", string(original))
					}
				}
				give()
				want := tool(t, "qemu-img", args...)
				give()
				got := drover(t, args...)
				wantOut, gotOut := want.stdout, got.stdout
				if name == "broken" && mode == "all" {
					wantOut, gotOut = end.ReplaceAllString(wantOut, ""), end.ReplaceAllString(gotOut, "")
				}
				if sortJSON(t, gotOut) != sortJSON(t, wantOut) || got.code != want.code {
					t.Errorf("%s: %q: code %d, qemu-img's is %d\n%s%s", name, args, got.code, want.code, cmp.Diff(wantOut, gotOut), got.stderr)
				}
				if err == nil && got.code == 0 && mode == "all" {
					if o := tool(t, "qemu-img", "check", "copy"); name != "raw" && o.code != 0 {
						t.Errorf("%s: qemu-img check after the repair: %d\n%s", name, o.code, o.stderr)
					}
				}
			}
		}
	}
}

// sortJSON gives lines an order, for QEMU's have none.
func sortJSON(t *testing.T, s string) string {
	t.Helper()
	if !strings.HasPrefix(s, "{") {
		return s
	}
	lines := strings.Split(strings.ReplaceAll(s, ",\n", "\n"), "\n")
	for i := range lines {
		for k := i + 1; k < len(lines); k++ {
			if lines[k] < lines[i] {
				lines[i], lines[k] = lines[k], lines[i]
			}
		}
	}
	return strings.Join(lines, "\n")
}

func TestPreviewUndoRestore(t *testing.T) {
	images(t)
	edit(t, "base", "leaks", 0x20000+11, 3)
	for _, name := range []string{"leaks", "broken"} {
		before, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		code := map[string]int{"leaks": exitCorrupt, "broken": exitCorrupt}[name]
		o := drover(t, "check", "-r", "all", "--preview", name)
		if o.code != code || !strings.Contains(o.stdout, "would be repaired") || !strings.Contains(o.stdout, "No errors were found") {
			t.Errorf("preview of %s: code %d\n%s%s", name, o.code, o.stdout, o.stderr)
		}
		if now, err := os.ReadFile(name); err != nil || !bytes.Equal(now, before) {
			t.Fatalf("the preview has changed %s (%v)", name, err)
		}
		mustDrover(t, "check", "-q", "-r", "all", "--undo", name+".undo", name)
		mustTool(t, "qemu-img", "check", name)
		if o := drover(t, "check", "-r", "all", "--undo", name+".undo", name); o.code != 1 || !strings.Contains(o.stderr, "exist") {
			t.Errorf("an undo log over another: code %d, %s", o.code, o.stderr)
		}
		if out := mustDrover(t, "check", "--restore", name+".undo", name); !strings.HasPrefix(out, "Restored ") {
			t.Errorf("restoring says %q", out)
		}
		if now, err := os.ReadFile(name); err != nil || !bytes.Equal(now, before) {
			t.Errorf("%s is not what it was (%v)", name, err)
		}
	}
	// Nothing to repair, nothing to keep.
	mustDrover(t, "check", "-r", "all", "--undo", "none.undo", "base")
	if _, err := os.Stat("none.undo"); !os.IsNotExist(err) {
		t.Errorf("an empty undo log is left: %v", err)
	}
	if o := drover(t, "check", "--restore", "leaks.undo", "compressed"); o.code != 1 || !strings.Contains(o.stderr, "not the one") {
		t.Errorf("restoring another image: code %d, %s", o.code, o.stderr)
	}
	for _, args := range [][]string{{"--preview"}, {"--undo", "x"}, {"-r", "all", "--preview", "--undo", "x"}, {"-r", "all", "--restore", "leaks.undo"}} {
		if o := drover(t, append(append([]string{"check"}, args...), "base")...); o.code != 1 || !strings.Contains(o.stderr, "--help") {
			t.Errorf("%q: code %d, %s", args, o.code, o.stderr)
		}
	}
	if o := drover(t, "check", "-U", "-r", "all", "base"); o.code != 1 || !strings.Contains(o.stderr, "force-share=on can only") {
		t.Errorf("sharing a repair: code %d, %s", o.code, o.stderr)
	}
}

// TestLeaksOfDirtyImage: qemu-img check -r leaks clears the dirty bit of an image whose refcounts are wrong, and later
// writes destroy data. Here it refuses, and the image is as it was.
func TestLeaksOfDirtyImage(t *testing.T) {
	images(t)
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "lazy", "10M")
	tool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 0x11 0 1M", "-c", "flush", "-c", "sigraise 9", "lazy")
	before, err := os.ReadFile("lazy")
	if err != nil {
		t.Fatal(err)
	}
	if o := drover(t, "check", "-r", "leaks", "lazy"); o.code != 1 || !strings.Contains(o.stderr, "not closed cleanly") {
		t.Errorf("code %d, %s", o.code, o.stderr)
	}
	if after, err := os.ReadFile("lazy"); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the image has changed (%v)", err)
	}
}
