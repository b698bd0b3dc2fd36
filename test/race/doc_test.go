// Package race looks for orders of events in which the engine goes wrong.
//
// # Model
//
// An exploration (explore_test.go) has up to sixteen clients use one small image at once: reads, writes, zeroes, discards,
// flushes, checks, attempts without waiting, cancelled requests, and sometimes a Close in the middle. The file below
// (busy_test.go) delays calls at random, so that a slow reader or writer overlaps with what frees and reuses the clusters
// it works on. Every client notes what it asked, what it was told and when (history_test.go); afterwards porcupine decides
// sector by sector whether some order of the requests explains all answers. A request over many sectors counts as one
// request for each: more is not promised.
//
// The seed decides the image, the requests and the delays. It does not decide what the scheduler makes of them: a seed that
// failed once is worth running many times.
//
//	DROVER_LONG=10m go test -race -cpu 1,2,8 -timeout 0 -run TestExplore ./test/race   # explore for ten minutes
//	DROVER_SEED=77 DROVER_LONG=1m go test -race -run TestExplore ./test/race           # one seed again and again
//
// The orders known to be dangerous are staged one by one (staged_test.go), with calls of the storage held up until the
// other actors have done their part. The failures that other engines had in the field are in regress_test.go.
package race
