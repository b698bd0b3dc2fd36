package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
)

// tree finds declarations in the sources below a folder.
type tree struct {
	root    string
	folders map[string]names
}

// names is what a folder declares: its identifiers ("Name", "Type.Member") and its test functions.
type names struct{ code, tests map[string]bool }

func newTree(root string) *tree { return &tree{root, make(map[string]names)} }

func (t *tree) folder(name string) (names, error) {
	if n, ok := t.folders[name]; ok {
		return n, nil
	}
	n := names{make(map[string]bool), make(map[string]bool)}
	paths, err := filepath.Glob(filepath.Join(t.root, filepath.FromSlash(name), "*.go"))
	if err != nil {
		return n, err
	}
	for _, path := range paths {
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return n, err
		}
		for _, decl := range file.Decls {
			n.add(decl, strings.HasSuffix(path, "_test.go"))
		}
	}
	t.folders[name] = n
	return n, nil
}

func (n names) add(decl ast.Decl, isTest bool) {
	switch d := decl.(type) {
	case *ast.FuncDecl:
		switch {
		case isTest && d.Recv == nil:
			n.tests[d.Name.Name] = true
		case !isTest && d.Recv == nil:
			n.code[d.Name.Name] = true
		case !isTest:
			n.code[receiver(d.Recv.List[0].Type)+"."+d.Name.Name] = true
		}
	case *ast.GenDecl:
		if isTest {
			return
		}
		for _, spec := range d.Specs {
			n.addSpec(spec)
		}
	}
}

func (n names) addSpec(spec ast.Spec) {
	switch s := spec.(type) {
	case *ast.ValueSpec:
		for _, id := range s.Names {
			n.code[id.Name] = true
		}
	case *ast.TypeSpec:
		n.code[s.Name.Name] = true
		fields, ok := s.Type.(*ast.StructType)
		if !ok {
			return
		}
		for _, field := range fields.Fields.List {
			for _, id := range field.Names {
				n.code[s.Name.Name+"."+id.Name] = true
			}
		}
	}
}

func receiver(e ast.Expr) string {
	switch x := e.(type) {
	case *ast.StarExpr:
		return receiver(x.X)
	case *ast.IndexExpr:
		return receiver(x.X)
	case *ast.Ident:
		return x.Name
	}
	return ""
}

// place splits "folder.Identifier": the folder ends at the first dot behind its last slash.
func place(code string) (folder, name string) {
	slash := strings.LastIndexByte(code, '/') + 1
	base, name, _ := strings.Cut(code[slash:], ".")
	return code[:slash] + base, name
}

// testRef is a test that an item names.
type testRef struct{ folder, name string }

func (r testRef) String() string { return r.folder + " " + r.name }

// function is the test function, without a subtest.
func (r testRef) function() string {
	name, _, _ := strings.Cut(r.name, "/")
	return name
}

func (i item) refs() []testRef {
	var refs []testRef
	for _, text := range strings.Split(i.tests, ";") {
		folder, name, _ := strings.Cut(strings.TrimSpace(text), " ")
		refs = append(refs, testRef{folder, name})
	}
	return refs
}

// problems says what an item names that does not exist.
func (t *tree) problems(i item) []string {
	var bad []string
	if strings.TrimSpace(i.code) == "" || strings.TrimSpace(i.tests) == "" {
		bad = append(bad, fmt.Sprintf("%s: names no code or no test", i.name))
	}
	for _, code := range strings.Fields(i.code) {
		folder, name := place(code)
		n, err := t.folder(folder)
		if err != nil {
			bad = append(bad, err.Error())
		} else if !n.code[name] {
			bad = append(bad, fmt.Sprintf("%s: %s is not declared", i.name, code))
		}
	}
	for _, ref := range i.refs() {
		n, err := t.folder(ref.folder)
		if err != nil {
			bad = append(bad, err.Error())
		} else if !n.tests[ref.function()] {
			bad = append(bad, fmt.Sprintf("%s: there is no test %v", i.name, ref))
		}
	}
	return bad
}

// allProblems checks every item, and that no name stands twice in a group.
func allProblems(root string) []string {
	t := newTree(root)
	var bad []string
	for _, g := range groups {
		seen := make(map[string]bool)
		for _, i := range g.items {
			if seen[i.name] {
				bad = append(bad, fmt.Sprintf("%s stands twice in %s", i.name, g.title))
			}
			seen[i.name] = true
			bad = append(bad, t.problems(i)...)
		}
	}
	return bad
}

// document is docs/coverage.md.
func document() string {
	var b strings.Builder
	total := 0
	for _, g := range groups {
		total += len(g.items)
	}
	fmt.Fprintf(&b, `# The items of qcow2.h

tcmu-runner, the user-space half of LIO's SCSI targets, brings a header of the QCOW2 format: %d constants, options,
fields, structures and helpers, most of which its own driver declares and never uses. Here each of them works. The table
says for every item where it lives in drover and which tests show it; what QEMU has added to the format since is in
[format-notes.md](format-notes.md).

`+"`make coverage-table`"+` writes this file from `+"`test/coverage`"+`: it demands that every declaration and every test named
here exists, runs these tests, and fails if one of them fails or is skipped.
`, total)
	for _, g := range groups {
		fmt.Fprintf(&b, "\n## %s\n\n", g.title)
		if g.intro != "" {
			fmt.Fprintf(&b, "%s\n\n", g.intro)
		}
		b.WriteString("| item | | code | tests |\n| --- | --- | --- | --- |\n")
		for _, i := range g.items {
			code := "`" + strings.Join(strings.Fields(i.code), "`, `") + "`"
			var tests []string
			for _, ref := range i.refs() {
				tests = append(tests, "`"+ref.String()+"`")
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", i.name, i.what, code, strings.Join(tests, ", "))
		}
	}
	return b.String()
}

func writeDocument(root string) error {
	return os.WriteFile(filepath.Join(root, "docs", "coverage.md"), []byte(document()), 0o644)
}
