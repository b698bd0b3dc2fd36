package cli

import (
	"context"
	"errors"
	"math"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
)

// benchmark is one run of bench.
type benchmark struct {
	*app
	src                               source
	count, depth, flushEvery, pattern string
	size, step, offset                string
	aio, cache, output                string
	native, write, quiet              bool
	requests                          image.BenchOptions
}

func (a *app) benchCommand() *cobra.Command {
	b := &benchmark{app: a}
	cmd := &cobra.Command{
		Use:   "bench [flags] FILE",
		Short: "Measure how fast an image answers requests",
		Long: `Make requests of the disk in an image, several at a time, and tell how long they
took together. With -w what the disk holds is written over.`,
		RunE: func(cmd *cobra.Command, args []string) error { return b.run(cmd, args) },
	}
	f := cmd.Flags()
	f.StringVarP(&b.count, "count", "c", "75000", "`number` of requests")
	f.StringVarP(&b.depth, "depth", "d", "64", "`number` of requests at a time")
	b.src.add(cmd)
	f.StringVar(&b.flushEvery, "flush-interval", "", "flush after each `NUMBER` of writes")
	f.StringVarP(&b.aio, "aio", "i", "", "AIO `mode` of qemu-img (accepted, without effect)")
	f.BoolVarP(&b.native, "native", "n", false, "native AIO of qemu-img (accepted, without effect)")
	f.BoolVar(&b.requests.NoDrain, "no-drain", false, "let writes go on while a flush runs")
	f.StringVarP(&b.offset, "offset", "o", "0", "`offset` of the first request")
	f.StringVarP(&b.step, "step-size", "S", "", "`distance` from one request to the next; by default their size")
	f.StringVar(&b.pattern, "pattern", "0", "`byte` that is written")
	f.BoolVarP(&b.quiet, "quiet", "q", false, "print nothing but errors and the result")
	f.StringVarP(&b.size, "buffer-size", "s", "4096", "`size` of a request")
	f.StringVarP(&b.cache, "cache", "t", "", "cache `mode` of qemu-img (accepted, without effect)")
	f.BoolVarP(&b.write, "write", "w", false, "write instead of reading")
	resultFlag(cmd, &b.output)
	b.src.policy.add(f)
	return cmd
}

func (b *benchmark) run(cmd *cobra.Command, args []string) error {
	if err := b.parse(); err != nil {
		return err
	}
	if err := oneImage(cmd, args); err != nil {
		return err
	}
	o := b.requests
	switch {
	case !o.Write && o.FlushEvery != 0:
		return errorf("--flush-interval is only available in write tests")
	case o.FlushEvery != 0 && o.FlushEvery < o.Depth:
		return errorf("Flush interval can't be smaller than depth")
	}
	if err := b.src.set(args[0]); err != nil {
		return err
	}
	return b.bench(cmd.Context(), args[0])
}

// parse takes the numbers, in the words of qemu-img.
func (b *benchmark) parse() error {
	o := &b.requests
	o.Write = b.write
	number := func(text string, least, most int64, what string) (int, error) {
		n, err := strconv.ParseInt(text, 0, 64)
		if err != nil || n < least || n > most {
			return 0, errorf("Invalid %s specified", what)
		}
		return int(n), nil
	}
	var err error
	if o.Count, err = number(b.count, 0, math.MaxInt32, "request count"); err != nil {
		return err
	}
	if o.Depth, err = number(b.depth, 1, math.MaxInt32, "queue depth"); err != nil {
		return err
	}
	if b.flushEvery != "" {
		if o.FlushEvery, err = number(b.flushEvery, 0, math.MaxInt32, "flush interval"); err != nil {
			return err
		}
	}
	pattern, err := number(b.pattern, 0, 0xff, "pattern byte")
	if err != nil {
		return err
	}
	o.Pattern = byte(pattern)
	size, err := b.bounded("buffer size", b.size)
	if err != nil {
		return err
	}
	o.Size = int(size)
	if o.Offset, err = parseSize("offset", b.offset); err != nil {
		return err
	}
	if o.Step = size; b.step != "" {
		if o.Step, err = b.bounded("step_size", b.step); err != nil {
			return err
		}
	}
	if o.Step == 0 {
		o.Step = size
	}
	if !slices.Contains([]string{"", "threads", "native", "io_uring"}, b.aio) {
		return errorf("Invalid aio option: %s", b.aio)
	}
	if checkCache(b.cache) != nil {
		return errorf("Invalid cache mode")
	}
	return checkOutput(b.output)
}

// bounded reads a size that must fit into 31 bits.
func (b *benchmark) bounded(what, text string) (int64, error) {
	n, err := block.ParseSize(text)
	if err == nil && n > math.MaxInt32 || errors.Is(err, block.ErrSizeRange) {
		return 0, errorf("Invalid %s specified. Must be between 0 and %d.", what, math.MaxInt32)
	}
	return parseSize(what, text)
}

// benchResult is the JSON of bench.
type benchResult struct {
	Command  string  `json:"command"`
	Filename string  `json:"filename"`
	Requests int     `json:"requests"`
	Size     int     `json:"request-size"`
	Depth    int     `json:"depth"`
	Write    bool    `json:"write"`
	Seconds  float64 `json:"seconds"`
	PerSec   float64 `json:"requests-per-second"`
}

func (b *benchmark) bench(ctx context.Context, name string) (err error) {
	dev, err := b.openDevice(ctx, &b.src, !b.write)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	o := b.requests
	if b.output != "json" {
		verb := "read"
		if o.Write {
			verb = "write"
		}
		b.printf("Sending %d %s requests, %d bytes each, %d in parallel (starting at offset %d, step size %d)\n",
			o.Count, verb, o.Size, o.Depth, o.Offset, o.Step)
		if o.FlushEvery > 0 {
			b.printf("Sending flush every %d requests\n", o.FlushEvery)
		}
	}
	took, err := image.Bench(ctx, dev, o)
	switch {
	case errors.Is(err, block.ErrOutOfRange):
		return errorf("Failed request: Input/output error")
	case err != nil:
		return errorf("Failed request: %s", readReason(err))
	case b.output == "json":
		s := took.Seconds()
		return b.printJSON(benchResult{"bench", name, o.Count, o.Size, o.Depth, o.Write, s, float64(o.Count) / max(s, 1e-9)})
	}
	b.printf("Run completed in %3.3f seconds.\n", took.Seconds())
	return nil
}
