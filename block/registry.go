package block

import (
	"fmt"
	"slices"
	"sync"
)

// registry is what packages make known by name from their init functions.
type registry[T any] struct {
	kind   string // what is registered, for messages
	mu     sync.RWMutex
	byName map[string]T
}

// register panics when the name is taken, since that is a mistake in the program.
func (r *registry[T]) register(name string, v T) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byName == nil {
		r.byName = make(map[string]T)
	}
	if _, ok := r.byName[name]; ok {
		panic(fmt.Sprintf("block: %s %q is registered twice", r.kind, name))
	}
	r.byName[name] = v
}

func (r *registry[T]) lookup(name string) (T, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	v, ok := r.byName[name]
	return v, ok
}

// names returns what is registered in alphabetical order.
func (r *registry[T]) names() []string {
	r.mu.RLock()
	defer r.mu.RUnlock()
	names := make([]string, 0, len(r.byName))
	for n := range r.byName {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}
