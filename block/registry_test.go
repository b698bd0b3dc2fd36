package block

import (
	"slices"
	"strings"
	"testing"
)

func TestRegistry(t *testing.T) {
	r := registry[int]{kind: "number"}
	if _, ok := r.lookup("one"); ok || len(r.names()) != 0 {
		t.Error("an empty registry knows something")
	}
	r.register("two", 2)
	r.register("one", 1)
	if v, ok := r.lookup("two"); !ok || v != 2 {
		t.Errorf("two is %d, %v", v, ok)
	}
	if got := r.names(); !slices.Equal(got, []string{"one", "two"}) {
		t.Errorf("names %v", got)
	}
	defer func() {
		if text, _ := recover().(string); !strings.Contains(text, `number "one" is registered twice`) {
			t.Errorf("registering a name twice: %q", text)
		}
		if v, _ := r.lookup("one"); v != 1 {
			t.Errorf("the first registration is lost: %d", v)
		}
	}()
	r.register("one", 3)
}
