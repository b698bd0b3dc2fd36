// Package lint keeps the rules of the house that no compiler knows: which folder may import which, who may open files,
// and what must not be in the sources.
package lint

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

const (
	module = "github.com/droverproject/drover"
	root   = "../.."
)

// layers says for every folder which others it may import; each may import itself and what lies inside it. An import
// always points down: "everything below" is written out, so that a new arrow is a visible change.
var layers = map[string][]string{
	"cmd/drover": {"internal/cli", "luks/ciphers"},
	"internal/cli": {
		"daemon", "nbd", "tcmu", "scsi", "image", "qcow1", "qcow2", "luks", "block", "storage", "internal/nbddev",
		"internal/picture",
	},
	"daemon": {"nbd", "tcmu", "image", "block", "qcow2", "luks", "storage"},
	"nbd":    {"block", "storage"},
	"tcmu":   {"scsi", "block", "storage"},
	"scsi":   {"block", "storage"},
	"image":  {"block", "qcow2", "storage"},
	"qcow2":  {"block", "storage", "luks"},
	"qcow1":  {"block", "storage", "luks"},
	"luks":   {},
	// Ciphers that the standard library lacks; a program picks them by importing it.
	"luks/ciphers": {"luks"},
	"block":        {"storage"},
	"storage":      {},
	// Certificates for tests.
	"internal/certtest": {},
	// The kernel's NBD client.
	"internal/nbddev": {},
	// Drawings.
	"internal/picture": {},
}

// modules says which modules outside the standard library a folder's own code may use. Tests may use testModules too.
var modules = map[string][]string{
	"cmd/drover":   {},
	"internal/cli": {"github.com/spf13/cobra", "github.com/spf13/pflag", "golang.org/x/sys"},
	"daemon":       {"golang.org/x/sys", "github.com/godbus/dbus/v5", "github.com/prometheus/client_model", "github.com/prometheus/common"},
	"nbd":          {"golang.org/x/sys"},
	"tcmu":         {"golang.org/x/sys", "github.com/mdlayher/genetlink", "github.com/mdlayher/netlink"},
	"scsi":         {},
	"image":        {"golang.org/x/sys"},
	"qcow1":        {},
	"qcow2":        {"github.com/klauspost/compress", "golang.org/x/sys"},
	"luks":         {"golang.org/x/sys"},
	"luks/ciphers": {"golang.org/x/crypto"},
	"block":        {"golang.org/x/sys"},
	"storage":      {"golang.org/x/sys"},
	"test":         {"golang.org/x/sys", "github.com/klauspost/compress"}, // the latter as a yardstick by itself

	"internal/certtest": {},
	"internal/picture":  {},
	"internal/nbddev":   {"golang.org/x/sys", "github.com/mdlayher/genetlink", "github.com/mdlayher/netlink"},
}

var testModules = []string{
	"pgregory.net/rapid", "github.com/google/go-cmp", "golang.org/x/sys", "github.com/anishathalye/porcupine", "go.uber.org/goleak",
}

// noFiles are the folders that reach host files through the storage package only.
var noFiles = []string{"qcow1", "qcow2", "block", "image", "nbd"}

// fileCalls are the functions of package os that reach a file's content or change a folder. Asking what a name stands for
// (Stat) is not among them.
var fileCalls = regexp.MustCompile(`^(Open|OpenFile|OpenInRoot|OpenRoot|Create|CreateTemp|ReadFile|WriteFile|Truncate|` +
	`Remove|RemoveAll|Rename|Mkdir|MkdirAll|MkdirTemp|ReadDir|Link|Symlink|NewFile|DirFS|Chmod)$`)

type source struct {
	path   string // slash-separated, from the root
	room   string // the folder of the table that it belongs to, "" for none
	isTest bool   // a test file, or a package of test helpers (its folder's name ends with "test")
	fset   *token.FileSet
	file   *ast.File
}

func TestImportsPointDown(t *testing.T) {
	for _, s := range sources(t) {
		if s.room == "" {
			t.Errorf("%s: its folder is in no layer; say in this test's table which one", s.path)
			continue
		}
		for _, spec := range s.file.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatalf("%s: %v", s.path, err)
			}
			if why := forbidden(s, name); why != "" {
				t.Errorf("%s imports %q: %s", s.path, name, why)
			}
		}
	}
}

// forbidden returns why a source may not import a package, "" when it may.
func forbidden(s source, name string) string {
	switch {
	case name == "C":
		return "no cgo anywhere"
	case name == module || strings.HasPrefix(name, module+"/"):
		return forbiddenRoom(s, roomOf(strings.TrimPrefix(strings.TrimPrefix(name, module), "/")))
	case !strings.Contains(strings.SplitN(name, "/", 2)[0], "."):
		return "" // the standard library
	}
	allowed := modules[s.room]
	if s.isTest {
		allowed = append(append([]string{}, allowed...), testModules...)
	}
	for _, m := range allowed {
		if name == m || strings.HasPrefix(name, m+"/") {
			return ""
		}
	}
	return "this folder may not use that module"
}

func forbiddenRoom(s source, room string) string {
	if room == s.room || s.room == "test" {
		return ""
	}
	for _, r := range layers[s.room] {
		if r == room {
			return ""
		}
	}
	if s.isTest && strings.HasSuffix(room, "test") {
		return "" // helpers of tests
	}
	return "imports point down, and that is not below " + s.room
}

func TestFilesAreReachedThroughStorage(t *testing.T) {
	for _, s := range sources(t) {
		if s.isTest || !contains(noFiles, s.room) {
			continue
		}
		for _, call := range fileSelectors(s.file) {
			t.Errorf("%v: os.%s: this folder reaches files through package storage only", s.fset.Position(call.Pos()),
				call.Sel.Name)
		}
	}
}

// fileSelectors returns the uses of file functions of package os.
func fileSelectors(file *ast.File) []*ast.SelectorExpr {
	local := ""
	for _, spec := range file.Imports {
		if spec.Path.Value == `"os"` {
			local = "os"
			if spec.Name != nil {
				local = spec.Name.Name
			}
		}
	}
	if local == "" {
		return nil
	}
	var found []*ast.SelectorExpr
	ast.Inspect(file, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		if x, ok := sel.X.(*ast.Ident); ok && x.Name == local && fileCalls.MatchString(sel.Sel.Name) {
			found = append(found, sel)
		}
		return true
	})
	return found
}

// A path that only one machine has. The words are put together here so that this file does not contain them.
var placePaths = regexp.MustCompile(`(^|[^A-Za-z0-9_.\-/])/(` + strings.Join([]string{"wo" + "rk", "ro" + "ot", "ho" + "me", "Us" + "ers"}, "|") +
	`)/[a-z.]`)

func TestNoPathsOfOneMachine(t *testing.T) {
	eachFile(t, func(name string, data []byte) {
		if bytes.IndexByte(data, 0) >= 0 {
			return // not text
		}
		for i, line := range bytes.Split(data, []byte("\n")) {
			if placePaths.Match(line) {
				t.Errorf("%s:%d names a path of one machine: %s", name, i+1, line)
			}
		}
	})
}

// TestTheRulesBite feeds the rules with what they must reject, lest a slip in this file make them accept all.
func TestTheRulesBite(t *testing.T) {
	for _, c := range []struct {
		from   string
		name   string
		reject bool
	}{
		{"storage/x.go", module + "/block", true},
		{"qcow2/internal/meta/x.go", module + "/nbd", true},
		{"qcow2/internal/meta/x.go", module + "/qcow2/internal/format", false},
		{"qcow2/x.go", "github.com/klauspost/compress/zstd", false},
		{"qcow2/x.go", "github.com/spf13/cobra", true},
		{"qcow2/x.go", "pgregory.net/rapid", true},
		{"qcow2/x_test.go", "pgregory.net/rapid", false},
		{"block/blocktest/x.go", "pgregory.net/rapid", false},
		{"nbd/x.go", module + "/qcow2", true},
		{"cmd/drover/main.go", module + "/qcow2", true},
		{"cmd/drover/main.go", module + "/internal/cli", false},
		{"block/x.go", "C", true},
		{"test/kill/x_test.go", module + "/qcow2", false},
		{"nbd/x_test.go", module + "/internal/certtest", false},
		{"nbd/x.go", module + "/internal/certtest", true},
	} {
		s := source{path: c.from, room: roomOf(path.Dir(c.from)), isTest: isTest(c.from)}
		if got := forbidden(s, c.name) != ""; got != c.reject {
			t.Errorf("%s importing %s: rejected %t, want %t", c.from, c.name, got, c.reject)
		}
	}
	file, err := parser.ParseFile(token.NewFileSet(), "x.go", `package x
import host "os"
func f() { host.Open("a"); host.Getenv("b") }`, 0)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(fileSelectors(file)); n != 1 {
		t.Errorf("found %d file calls in a source with one", n)
	}
	if !placePaths.MatchString("see /" + "wo" + "rk/main") {
		t.Error("a path of one machine goes unnoticed")
	}
}

// roomOf returns the folder of the table that a package belongs to.
func roomOf(dir string) string {
	for d := dir; d != "." && d != ""; d = path.Dir(d) {
		if _, ok := modules[d]; ok {
			return d
		}
	}
	return ""
}

func isTest(name string) bool {
	return strings.HasSuffix(name, "_test.go") || strings.HasSuffix(path.Dir(name), "test")
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

// sources parses every Go file of the module, for every platform.
func sources(t *testing.T) []source {
	t.Helper()
	var all []source
	eachFile(t, func(name string, data []byte) {
		if path.Ext(name) != ".go" || strings.HasPrefix(name, "tools/") {
			return
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, name, data, parser.SkipObjectResolution|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, source{name, roomOf(path.Dir(name)), isTest(name), fset, file})
	})
	if len(all) == 0 {
		t.Fatal("found no Go file at all")
	}
	return all
}

// eachFile calls f for every file of the project.
func eachFile(t *testing.T, f func(name string, data []byte)) {
	t.Helper()
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if rel == ".git" || rel == "bin" || rel == "out" {
				return fs.SkipDir
			}
			return nil
		}
		if !d.Type().IsRegular() {
			return nil
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		f(filepath.ToSlash(rel), data)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
