package lint

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestLinkerDropsMethods: nothing in the program looks for methods by names that the linker does not know. If anything did
// (text/template does, and dbus.Conn.Export), every method of every type would stay in the program, which is then an eighth
// larger, on the disk and in memory.
func TestLinkerDropsMethods(t *testing.T) {
	cmd := exec.Command("go", "build", "-ldflags=-dumpdep", "-o", filepath.Join(t.TempDir(), "drover"), "./cmd/drover")
	cmd.Dir = filepath.Join("..", "..")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %.2000s", err, out)
	}
	lines := 0
	for line := range strings.Lines(string(out)) {
		lines++
		if strings.Contains(line, "<ReflectMethod>") {
			t.Errorf("methods are looked for by reflection: %s", line)
		}
	}
	if lines < 1000 {
		t.Errorf("the linker told of %d dependencies only", lines)
	}
}

// TestNothingIsCompiledAtStart: regular expressions are compiled where they are first used, not whenever the program starts.
func TestNothingIsCompiledAtStart(t *testing.T) {
	files := 0
	for _, room := range []string{"block", "cmd", "daemon", "image", "internal", "luks", "nbd", "qcow1", "qcow2", "scsi", "storage", "tcmu"} {
		err := filepath.WalkDir(filepath.Join("..", "..", room), func(path string, _ os.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			set := token.NewFileSet()
			f, err := parser.ParseFile(set, path, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			files++
			for _, decl := range f.Decls {
				if vars, ok := decl.(*ast.GenDecl); ok && vars.Tok == token.VAR {
					eachCompile(vars, func(at token.Pos) { t.Errorf("%s: compiled at every start", set.Position(at)) })
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if files < 100 {
		t.Errorf("%d files were looked at", files)
	}
}

// eachCompile finds what calls package regexp outside of functions.
func eachCompile(n ast.Node, found func(token.Pos)) {
	ast.Inspect(n, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncLit:
			return false
		case *ast.SelectorExpr:
			if x, ok := n.X.(*ast.Ident); ok && x.Name == "regexp" && strings.HasPrefix(n.Sel.Name, "MustCompile") {
				found(n.Pos())
			}
		}
		return true
	})
}
