package image

import "context"

// state tells what is to be done with the bytes at off, and up to where.
type stateFunc func(ctx context.Context, off int64) (kind uint8, end int64, err error)

// emitRuns cuts [0, total) into pieces of one kind each. Neighbours of one kind go together, in pieces of at most pieceSize
// where data is moved, so that many small extents cost no more than one large one. state is asked for each offset once, in
// order.
func emitRuns(ctx context.Context, total int64, moves func(kind uint8) bool, state stateFunc, emit func(*piece) bool) error {
	var run piece // not emitted yet
	flush := func(keep int64) bool {
		for run.n > keep {
			n := run.n
			if moves(run.kind) {
				n = min(n, pieceSize-run.off%pieceSize)
			}
			if !emit(&piece{off: run.off, n: n, kind: run.kind}) {
				return false
			}
			run.off, run.n = run.off+n, run.n-n
		}
		return true
	}
	for off := int64(0); off < total; {
		kind, end, err := state(ctx, off)
		if err != nil {
			return err
		}
		end = min(end, total)
		if kind != run.kind {
			if !flush(0) {
				return nil
			}
			run = piece{off: off, kind: kind}
		}
		run.n += end - off
		off = end
		if moves(kind) && !flush(pieceSize) {
			return nil
		}
	}
	flush(0)
	return nil
}
