package block

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
)

// RefKind says what an image wants another file for.
type RefKind string

// The references that images hold.
const (
	RefBacking RefKind = "backing file"
	RefData    RefKind = "data file"
)

// Ref is the wish of an image to have another file opened.
type Ref struct {
	Kind  RefKind
	Name  string // as the image stores it
	Path  string // Name resolved against the folder of Image, not cleaned; empty when Protocol is set
	Image string // path of the image that holds the reference
	Top   string // path of the image that the user named, at the top of the chain; empty when it is not in a file
	// Protocol is what stands before the colon when Name is not a plain file name: "json", "nbd", "https".
	Protocol string
}

// Grant says how a permitted file is opened.
type Grant struct {
	Path string
	// Root, if not empty, is a folder that opening Path (relative to it) must not leave, neither by ".." nor by a
	// symbolic link. This closes the gap between judging a name and using it.
	Root string
}

// Policy decides which files an image may refer to. It is asked before the file is looked at in any way. A refusal is an
// error that wraps a *PolicyError.
type Policy interface {
	Allow(ctx context.Context, r Ref) (Grant, error)
}

// PolicyError is the refusal of a Policy.
type PolicyError struct {
	Ref  Ref
	Rule string // what the policy permits instead
	Flag string // what the user may say to permit the file; empty when nothing does
}

// Error names the file, the rule and the way out.
func (e *PolicyError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "image %q names %s %q", e.Ref.Image, e.Ref.Kind, e.Ref.Name)
	if e.Ref.Protocol == "" && e.Ref.Path != e.Ref.Name {
		fmt.Fprintf(&b, " (%q)", e.Ref.Path)
	}
	fmt.Fprintf(&b, ", which is refused: %s", e.Rule)
	if e.Flag != "" {
		fmt.Fprintf(&b, "; use %s to allow it", e.Flag)
	}
	return b.String()
}

const flagAnyPath = "--allow-any-path"

// flagsFor is the way out for a plain file name: its folder, or everything.
func flagsFor(path string) string {
	return fmt.Sprintf("--allow-path %q or %s", filepath.Dir(path), flagAnyPath)
}

type policyFunc func(Ref) (Grant, error)

func (f policyFunc) Allow(_ context.Context, r Ref) (Grant, error) { return f(r) }

// DenyAll returns the policy that lets an image refer to nothing.
func DenyAll() Policy {
	return policyFunc(func(r Ref) (Grant, error) {
		if err := refuseProtocol(r); err != nil {
			return Grant{}, err
		}
		return Grant{}, &PolicyError{Ref: r, Rule: "images may not refer to other files here", Flag: flagsFor(r.Path)}
	})
}

// AllowAll returns the policy that follows every reference. It is for images whose origin the user trusts, at the
// user's word.
func AllowAll() Policy {
	return policyFunc(func(r Ref) (Grant, error) { return Grant{Path: r.Path}, nil })
}

// BelowImageFolder returns the policy for servers: plain file names in the folder of the image that the user named, or
// in a folder below it.
func BelowImageFolder() Policy {
	return policyFunc(func(r Ref) (Grant, error) {
		if err := refuseProtocol(r); err != nil {
			return Grant{}, err
		}
		if r.Top == "" {
			return Grant{}, &PolicyError{Ref: r, Rule: "an image that is not in a folder may refer to no file", Flag: flagsFor(r.Path)}
		}
		root := filepath.Dir(r.Top)
		if g, ok := below(root, r.Path); ok {
			return g, nil
		}
		rule := fmt.Sprintf("only files in %q and the folders below it may be referred to", root)
		return Grant{}, &PolicyError{Ref: r, Rule: rule, Flag: flagsFor(r.Path)}
	})
}

// Roots returns the policy that allows plain file names in the given folders and those below them.
func Roots(dirs []string) Policy {
	return policyFunc(func(r Ref) (Grant, error) {
		if err := refuseProtocol(r); err != nil {
			return Grant{}, err
		}
		for _, dir := range dirs {
			if g, ok := below(dir, r.Path); ok {
				return g, nil
			}
		}
		rule := fmt.Sprintf("only files below %s may be referred to", quoteList(dirs))
		return Grant{}, &PolicyError{Ref: r, Rule: rule, Flag: flagsFor(r.Path)}
	})
}

// AnyOf returns the policy that allows what one of the given ones allows. A refusal is that of the first.
func AnyOf(first Policy, others ...Policy) Policy { return anyOf{first, others} }

type anyOf struct {
	first  Policy
	others []Policy
}

func (p anyOf) Allow(ctx context.Context, r Ref) (Grant, error) {
	g, refusal := p.first.Allow(ctx, r)
	if refusal == nil {
		return g, nil
	}
	for _, o := range p.others {
		if g, err := o.Allow(ctx, r); err == nil {
			return g, nil
		}
	}
	return Grant{}, refusal
}

func refuseProtocol(r Ref) error {
	if r.Protocol == "" {
		return nil
	}
	rule := fmt.Sprintf("a name inside an image must be a plain file name, not %q", r.Protocol+":")
	return &PolicyError{Ref: r, Rule: rule, Flag: flagAnyPath}
}

// below reports whether path lies in root by its name, and if so grants it for as long as it also does so in fact.
func below(root, path string) (Grant, bool) {
	absPath, err := filepath.Abs(path)
	if err != nil {
		return Grant{}, false
	}
	absRoot, err := filepath.Abs(root)
	if err != nil {
		return Grant{}, false
	}
	candidates := []string{absRoot}
	if real, err := filepath.EvalSymlinks(absRoot); err == nil && real != absRoot {
		candidates = append(candidates, real) // an absolute name may use either spelling of the folder
	}
	for _, dir := range candidates {
		rel, err := filepath.Rel(dir, absPath)
		if err == nil && filepath.IsLocal(rel) && rel != "." {
			return Grant{Root: root, Path: rel}, true
		}
	}
	return Grant{}, false
}

func quoteList(names []string) string {
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = fmt.Sprintf("%q", n)
	}
	return strings.Join(quoted, ", ")
}
