package block

import "sync/atomic"

// DefaultCacheBudget is what the caches of all images of one process may take together if nobody says otherwise.
const DefaultCacheBudget = 256 << 20

// CacheBudget bounds the memory that the metadata caches of several devices take together. A device that finds it used up
// makes room in its own cache; each may always keep the little that it cannot work without. A nil budget bounds nothing.
type CacheBudget struct {
	limit int64
	used  atomic.Int64
}

// NewCacheBudget returns a budget of so many bytes.
func NewCacheBudget(bytes int64) *CacheBudget { return &CacheBudget{limit: bytes} }

// Full reports whether another n bytes would be too many.
func (b *CacheBudget) Full(n int64) bool { return b != nil && b.used.Load()+n > b.limit }

// Add notes that n bytes more are used, or with a negative n, fewer.
func (b *CacheBudget) Add(n int64) {
	if b != nil {
		b.used.Add(n)
	}
}

// Used returns how many bytes are used.
func (b *CacheBudget) Used() int64 {
	if b == nil {
		return 0
	}
	return b.used.Load()
}
