package lint

import (
	"go/ast"
	"path"
	"regexp"
	"strings"
	"testing"
)

// A test that a document names: "`TestX`", or "`room TestX`" for one in a folder whose path ends with room.
var (
	codeSpan  = regexp.MustCompile("`[^`\n]+`")
	testName  = regexp.MustCompile(`^(?:([A-Za-z0-9_/]+) )?((?:Test|Fuzz)[A-Z][A-Za-z0-9]*)$`)
	testPlace = regexp.MustCompile(`^test/[a-z]+$`)
)

// TestDocumentsNameRealTests: who reads that a test shows something must find that test.
func TestDocumentsNameRealTests(t *testing.T) {
	tests := make(map[string][]string) // the folders that have a test of a name
	rooms := make(map[string]bool)
	for _, s := range sources(t) {
		rooms[path.Dir(s.path)] = true
		if !strings.HasSuffix(s.path, "_test.go") {
			continue
		}
		for _, decl := range s.file.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil {
				tests[f.Name.Name] = append(tests[f.Name.Name], path.Dir(s.path))
			}
		}
	}
	documents, named := 0, 0
	eachFile(t, func(name string, data []byte) {
		if path.Ext(name) != ".md" {
			return
		}
		documents++
		for i, line := range strings.Split(string(data), "\n") {
			for _, span := range codeSpan.FindAllString(line, -1) {
				words := strings.Trim(span, "`")
				if testPlace.MatchString(words) && !rooms[words] && words != "test/lint" {
					t.Errorf("%s:%d names the folder %s, which does not exist", name, i+1, words)
				}
				m := testName.FindStringSubmatch(words)
				if m == nil {
					continue
				}
				named++
				if !inRoom(tests[m[2]], m[1]) {
					t.Errorf("%s:%d names the test %s, which does not exist; tests of that name are in %q", name, i+1, words, tests[m[2]])
				}
			}
		}
	})
	if documents == 0 || named == 0 {
		t.Errorf("found %d test names in %d documents: this test looks in the wrong place", named, documents)
	}
}

// inRoom reports whether one of the folders is the room; any is when room is "".
func inRoom(folders []string, room string) bool {
	for _, f := range folders {
		if room == "" || f == room || strings.HasSuffix(f, "/"+room) {
			return true
		}
	}
	return false
}

// TestNoTestWaitsForTime: a test that sleeps is slow where it works and fails where the machine is slower. Where time itself
// is what is tested, a comment on the line says so.
func TestNoTestWaitsForTime(t *testing.T) {
	for _, s := range sources(t) {
		if !s.isTest && s.room != "test" {
			continue
		}
		explained := make(map[int]bool)
		for _, group := range s.file.Comments {
			for _, c := range group.List {
				explained[s.fset.Position(c.Pos()).Line] = true
			}
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok || sel.Sel.Name != "Sleep" {
				return true
			}
			at := s.fset.Position(sel.Pos())
			if x, ok := sel.X.(*ast.Ident); ok && x.Name == "time" && !explained[at.Line] {
				t.Errorf("%v: time.Sleep: wait for what is expected, or say on this line why it must be time", at)
			}
			return true
		})
	}
}
