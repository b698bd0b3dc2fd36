package block_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/storage"
)

// The tests have a format of their own, "link": a file of three lines, "LINK", the backing file's name and its format,
// and a fourth with the name of a data file. It shows the backing's content, or zeroes.
const linkMagic = "LINK\n"

func init() {
	block.RegisterFormat(block.Format{
		Name:  "link",
		Probe: func(head []byte) bool { return bytes.HasPrefix(head, []byte(linkMagic)) },
		Open:  openLink,
	})
}

type link struct {
	block.Device // the file itself, for what a link need not do
	backing      block.Device
	data         storage.File
}

func openLink(ctx context.Context, file storage.File, o block.FormatOptions) (block.Device, error) {
	text := make([]byte, 4096)
	n, err := file.ReadAt(text, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	lines := strings.Split(string(text[:n])+"\n\n\n\n", "\n")
	if lines[0] != "LINK" {
		return nil, errors.New("not a link")
	}
	l := &link{}
	if lines[1] != "" {
		if l.backing, err = o.OpenBacking(ctx, lines[1], lines[2]); err != nil {
			return nil, err
		}
	}
	if lines[3] != "" {
		if l.data, err = o.OpenDataFile(ctx, strings.TrimPrefix(lines[3], "unnamed")); err != nil {
			return nil, errors.Join(err, l.closeBacking())
		}
	}
	l.Device, err = block.NewRaw(file, block.RawOptions{Name: o.Name, ReadOnly: o.ReadOnly})
	return l, err
}

func (l *link) closeBacking() error {
	if l.backing == nil {
		return nil
	}
	return l.backing.Close()
}

func (l *link) Close() error {
	err := errors.Join(l.Device.Close(), l.closeBacking())
	if l.data != nil {
		err = errors.Join(err, l.data.Close())
	}
	return err
}

// depth counts the images below dev.
func depth(dev block.Device) int {
	l, ok := dev.(*link)
	if !ok || l.backing == nil {
		return 0
	}
	return 1 + depth(l.backing)
}

func put(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func putLink(t *testing.T, path, backing, format string) string {
	t.Helper()
	return put(t, path, linkMagic+backing+"\n"+format+"\n")
}

func mustClose(t *testing.T, c io.Closer) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

func TestFormatMustBeGiven(t *testing.T) {
	path := put(t, filepath.Join(t.TempDir(), "disk"), "data")
	if _, err := block.Open(t.Context(), path, block.OpenOptions{}); !errors.Is(err, block.ErrFormatUnknown) {
		t.Errorf("no format: %v", err)
	}
	if _, err := block.Open(t.Context(), path, block.OpenOptions{Format: "vdi"}); !errors.Is(err, block.ErrUnknownFormat) {
		t.Errorf("format vdi: %v", err)
	}
	for format, file := range map[string]string{
		"raw":  path,
		"link": putLink(t, path+".link", "", ""),
	} {
		dev, err := block.Open(t.Context(), file, block.OpenOptions{AllowProbe: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, isLink := dev.(*link); isLink != (format == "link") {
			t.Errorf("%s probed as %T", file, dev)
		}
		mustClose(t, dev)
	}
}

// TestProbedRawKeepsItsFormat: a guest must not be able to turn its raw disk into an image that names other files.
func TestProbedRawKeepsItsFormat(t *testing.T) {
	path := put(t, filepath.Join(t.TempDir(), "disk"), strings.Repeat("x", 1024))
	ctx := t.Context()
	dev, err := block.Open(ctx, path, block.OpenOptions{AllowProbe: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		text string
		off  int64
		ok   bool
	}{
		{linkMagic, 0, false},
		{"LIN", 0, true},
		{"K", 3, true},
		{"\n", 4, false}, // the last piece
		{"\n", 600, true},
		{strings.Repeat("y", 1024), 0, true},
		{linkMagic + strings.Repeat("y", 1000), 0, false},
	} {
		err := dev.WriteAt(ctx, []byte(step.text), step.off, 0)
		if step.ok != (err == nil) || !step.ok && !errors.Is(err, block.ErrLooksLikeFormat) {
			t.Errorf("writing %.10q at %d: %v", step.text, step.off, err)
		}
	}
	if err := dev.Discard(ctx, 0, 1024); err != nil {
		t.Errorf("Discard: %v", err)
	}
	if err := dev.WriteZeroes(ctx, 0, 1024, 0); err != nil {
		t.Errorf("WriteZeroes: %v", err)
	}
	if err := dev.(block.TryDevice).TryWriteAt([]byte(linkMagic), 0); !errors.Is(err, block.ErrWouldBlock) {
		t.Errorf("TryWriteAt: %v", err)
	}
	mustClose(t, dev)

	// Whoever says that it is raw may write anything.
	dev, err = block.Open(ctx, path, block.OpenOptions{Format: "raw"})
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.WriteAt(ctx, []byte(linkMagic), 0, 0); err != nil {
		t.Error(err)
	}
	mustClose(t, dev)
}

func TestChainAndPolicies(t *testing.T) {
	dir := t.TempDir()
	other := t.TempDir()
	base := put(t, filepath.Join(dir, "sub", "base"), "base")
	outside := put(t, filepath.Join(other, "secret"), "secret")
	if err := os.Symlink(outside, filepath.Join(dir, "escape")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("sub/base", filepath.Join(dir, "inside")); err != nil {
		t.Fatal(err)
	}
	deny, below, all := block.DenyAll(), block.BelowImageFolder(), block.AllowAll()
	roots := block.Roots([]string{filepath.Join(dir, "sub"), other})
	both := block.AnyOf(below, roots)

	for i, tc := range []struct {
		backing string
		policy  block.Policy
		ok      bool
	}{
		{"sub/base", deny, false},
		{"sub/base", nil, false},
		{"sub/base", below, true},
		{"sub/base", roots, true},
		{"sub/base", all, true},
		{"file:sub/base", below, true},
		{"./sub/../sub/base", below, true},
		{base, below, true},
		{outside, below, false},
		{outside, roots, true},
		{outside, both, true},
		{outside, all, true},
		{"../" + filepath.Base(other) + "/secret", below, false},
		{"file:" + outside, below, false},
		{"escape", below, false}, // allowed by its name, and stopped on the way
		{"escape", all, true},
		{"inside", below, true},
		{"json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"" + outside + "\"}}", below, false},
		{"json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"" + outside + "\"}}", both, false},
		{"json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"" + outside + "\"}}", all, true},
		{"json:{\"driver\":\"raw\",\"file.filename\":\"" + outside + "\"}", all, true},
		{"json:{\"driver\":\"nbd\",\"server.path\":\"/x\"}", all, false},
		{"json:{", all, false},
		{"nbd:localhost:10809", below, false},
		{"nbd:localhost:10809", all, false},
		{"https://example.com/x", all, false},
		{"/dev/null", all, false}, // not a file that holds an image
		{"sub", all, false},       // a folder
		{".", below, false},
	} {
		top := putLink(t, filepath.Join(dir, fmt.Sprintf("top%d", i)), tc.backing, "raw")
		dev, err := block.Open(t.Context(), top, block.OpenOptions{Format: "link", ReadOnly: true, Policy: tc.policy})
		if err == nil {
			if depth(dev) != 1 {
				t.Errorf("%d %s: depth %d", i, tc.backing, depth(dev))
			}
			mustClose(t, dev)
		}
		if (err == nil) != tc.ok {
			t.Errorf("%d: backing %q: %v, want success: %v", i, tc.backing, err, tc.ok)
		}
	}
}

func TestRefusalSaysWhatAndHow(t *testing.T) {
	dir := t.TempDir()
	top := putLink(t, filepath.Join(dir, "top"), "/etc/passwd", "raw")
	_, err := block.Open(t.Context(), top, block.OpenOptions{Format: "link", ReadOnly: true, Policy: block.BelowImageFolder()})
	var refusal *block.PolicyError
	if !errors.As(err, &refusal) {
		t.Fatalf("%v is not a *PolicyError", err)
	}
	for _, part := range []string{top, `backing file "/etc/passwd"`, fmt.Sprintf("only files in %q", dir),
		`--allow-path "/etc"`, "--allow-any-path"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not mention %s", err, part)
		}
	}
	if refusal.Ref.Kind != block.RefBacking || refusal.Ref.Image != top || refusal.Ref.Top != top {
		t.Errorf("Ref = %+v", refusal.Ref)
	}
}

// TestNothingIsOpenedBeforeThePolicy: not even whether the file exists may be found out.
func TestNothingIsOpenedBeforeThePolicy(t *testing.T) {
	dir := t.TempDir()
	top := putLink(t, filepath.Join(dir, "top"), "/does/not/exist", "raw")
	_, err := block.Open(t.Context(), top, block.OpenOptions{Format: "link", Policy: block.BelowImageFolder()})
	if errors.Is(err, fs.ErrNotExist) || err == nil {
		t.Errorf("the refusal says whether the file exists: %v", err)
	}
}

func TestBackingFormatMustBeKnown(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "base"), "base")
	top := putLink(t, filepath.Join(dir, "top"), "base", "")
	o := block.OpenOptions{Format: "link", ReadOnly: true, Policy: block.BelowImageFolder()}
	_, err := block.Open(t.Context(), top, o)
	if !errors.Is(err, block.ErrFormatUnknown) || !strings.Contains(err.Error(), "rebase -u") {
		t.Errorf("no backing format: %v", err)
	}
	o.ProbeBacking = true
	dev, err := block.Open(t.Context(), top, o)
	if err != nil {
		t.Fatal(err)
	}
	mustClose(t, dev)
}

func TestBackingOverride(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	top := putLink(t, filepath.Join(dir, "top"), "/does/not/exist", "raw")
	mine := put(t, filepath.Join(other, "mine"), "mine")
	o := block.OpenOptions{Format: "link", ReadOnly: true, Backing: &block.Backing{Name: mine, Format: "raw"}}
	dev, err := block.Open(t.Context(), top, o) // no policy: what the user says needs none
	if err != nil {
		t.Fatal(err)
	}
	if depth(dev) != 1 {
		t.Errorf("depth %d", depth(dev))
	}
	mustClose(t, dev)

	dev, err = block.Open(t.Context(), top, block.OpenOptions{Format: "link", NoBacking: true})
	if err != nil {
		t.Fatal(err)
	}
	if depth(dev) != 0 {
		t.Errorf("NoBacking: depth %d", depth(dev))
	}
	mustClose(t, dev)
}

func TestNamesAreRelativeToTheirImage(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "base"), "base")
	putLink(t, filepath.Join(dir, "a", "middle"), "../base", "raw")
	top := putLink(t, filepath.Join(dir, "top"), "a/middle", "link")
	t.Chdir(dir)
	for _, name := range []string{top, "top", "./top", "file:top", "a/../top"} {
		for _, policy := range []block.Policy{block.AllowAll(), block.Roots([]string{"."})} {
			dev, err := block.Open(t.Context(), name, block.OpenOptions{Format: "link", ReadOnly: true, Policy: policy})
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if depth(dev) != 2 {
				t.Errorf("%s: depth %d, want 2", name, depth(dev))
			}
			mustClose(t, dev)
		}
	}
}

func TestCircles(t *testing.T) {
	dir := t.TempDir()
	a := putLink(t, filepath.Join(dir, "a"), "b", "link")
	putLink(t, filepath.Join(dir, "b"), "./c", "link")
	if err := os.Link(a, filepath.Join(dir, "c")); err != nil { // another name, the same file
		t.Fatal(err)
	}
	self := putLink(t, filepath.Join(dir, "self"), "self", "link")
	for _, name := range []string{a, self} {
		for _, o := range []block.OpenOptions{{}, {ReadOnly: true}, {NoLock: true}} {
			o.Format, o.Policy = "link", block.AllowAll()
			if _, err := block.Open(t.Context(), name, o); !errors.Is(err, block.ErrChain) {
				t.Errorf("%s %+v: %v, want ErrChain", name, o, err)
			}
		}
	}
}

func TestChainLength(t *testing.T) {
	dir := t.TempDir()
	const longest = 200
	put(t, filepath.Join(dir, "0"), "base")
	for i := 1; i <= longest; i++ {
		format := "link"
		if i == 1 {
			format = "raw"
		}
		putLink(t, filepath.Join(dir, fmt.Sprint(i)), fmt.Sprint(i-1), format)
	}
	o := block.OpenOptions{Format: "link", ReadOnly: true, Policy: block.BelowImageFolder()}
	dev, err := block.Open(t.Context(), filepath.Join(dir, fmt.Sprint(longest-1)), o)
	if err != nil {
		t.Fatal(err)
	}
	if depth(dev) != longest-1 {
		t.Errorf("depth %d", depth(dev))
	}
	mustClose(t, dev)
	if _, err := block.Open(t.Context(), filepath.Join(dir, fmt.Sprint(longest)), o); !errors.Is(err, block.ErrChain) {
		t.Errorf("%d images: %v, want ErrChain", longest+1, err)
	}
}

func TestDataFile(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "data"), "data")
	elsewhere := put(t, filepath.Join(t.TempDir(), "data"), "data")
	named := put(t, filepath.Join(dir, "named"), linkMagic+"\n\ndata\n")
	hostile := put(t, filepath.Join(dir, "hostile"), linkMagic+"\n\n"+elsewhere+"\n")
	unnamed := put(t, filepath.Join(dir, "unnamed"), linkMagic+"\n\nunnamed\n")
	for _, tc := range []struct {
		path     string
		override string
		policy   block.Policy
		ok       bool
	}{
		{named, "", block.BelowImageFolder(), true},
		{named, "", block.DenyAll(), false},
		{hostile, "", block.BelowImageFolder(), false},
		{hostile, "", block.AllowAll(), true},
		{hostile, elsewhere, block.DenyAll(), true},
		{unnamed, "", block.AllowAll(), false},
		{unnamed, elsewhere, block.DenyAll(), true},
	} {
		dev, err := block.Open(t.Context(), tc.path,
			block.OpenOptions{Format: "link", DataFile: tc.override, Policy: tc.policy})
		if (err == nil) != tc.ok {
			t.Errorf("%s, data file %q: %v, want success: %v", tc.path, tc.override, err, tc.ok)
		}
		if err == nil {
			mustClose(t, dev)
		}
	}
}

func TestLocks(t *testing.T) {
	path := put(t, filepath.Join(t.TempDir(), "disk"), strings.Repeat("x", 512))
	write := block.OpenOptions{Format: "raw"}
	read := block.OpenOptions{Format: "raw", ReadOnly: true}
	shared := block.OpenOptions{Format: "raw", ReadOnly: true, ForceShare: true}
	noLock := block.OpenOptions{Format: "raw", NoLock: true}
	for i, tc := range []struct {
		first, second block.OpenOptions
		ok            bool
	}{
		{write, write, false}, {write, read, false}, {write, shared, true}, {write, noLock, true},
		{read, read, true}, {read, write, false}, {shared, write, true},
	} {
		a, err := block.Open(t.Context(), path, tc.first)
		if err != nil {
			t.Fatal(err)
		}
		b, err := block.Open(t.Context(), path, tc.second)
		var conflict *storage.LockError
		if (err == nil) != tc.ok || err != nil && !errors.As(err, &conflict) {
			t.Errorf("%d: second user: %v, want success: %v", i, err, tc.ok)
		}
		if err == nil {
			mustClose(t, b)
		}
		mustClose(t, a)
	}
	if _, err := block.Open(t.Context(), path, block.OpenOptions{Format: "raw", ForceShare: true}); err == nil {
		t.Error("ForceShare without ReadOnly is accepted")
	}
}

func TestOddFilesAndNames(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{dir, "/dev/null", filepath.Join(dir, "missing"), "", "file:", "nbd://localhost/x",
		"json:{}", "fat:/", strings.Repeat("x", 5000)} {
		if dev, err := block.Open(t.Context(), name, block.OpenOptions{Format: "raw", ReadOnly: true}); err == nil {
			t.Errorf("%.20q can be opened", name)
			mustClose(t, dev)
		}
	}
	colon := put(t, filepath.Join(dir, "a:b"), "x")
	t.Chdir(dir)
	for name, ok := range map[string]bool{colon: true, "./a:b": true, "file:a:b": true, "a:b": false} {
		dev, err := block.Open(t.Context(), name, block.OpenOptions{Format: "raw", ReadOnly: true})
		if (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
		if err == nil {
			mustClose(t, dev)
		}
	}
}

func TestIO(t *testing.T) {
	path := put(t, filepath.Join(t.TempDir(), "disk"), strings.Repeat("0123456789abcdef", 64))
	dev, err := block.Open(t.Context(), path, block.OpenOptions{Format: "raw"})
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, dev)
	a := block.NewIO(t.Context(), dev)
	got, err := io.ReadAll(io.NewSectionReader(a, 1000, 1<<40))
	if err != nil || string(got) != "89abcdef0123456789abcdef" {
		t.Errorf("tail = %q, %v", got, err)
	}
	if n, err := a.WriteAt([]byte("xyz"), 1022); n != 2 || !errors.Is(err, block.ErrOutOfRange) {
		t.Errorf("WriteAt past the end = %d, %v", n, err)
	}
	buf := make([]byte, 4)
	if n, err := a.ReadAt(buf, 1021); n != 3 || err != io.EOF || string(buf[:n]) != "dxy" {
		t.Errorf("ReadAt at the end = %d, %v, %q", n, err, buf[:n])
	}
	if _, err := a.ReadAt(buf, -1); !errors.Is(err, block.ErrOutOfRange) {
		t.Errorf("ReadAt(-1) = %v", err)
	}
	if n, err := a.ReadAt(buf, 5000); n != 0 || err != io.EOF {
		t.Errorf("ReadAt(5000) = %d, %v", n, err)
	}
}
