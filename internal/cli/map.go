package cli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
)

func (a *app) mapCommand() *cobra.Command {
	var src source
	var output, start, length, picture string
	cmd := &cobra.Command{
		Use:   "map [flags] FILE",
		Short: "Show where the data of an image lies",
		Long: `Show which parts of an image and of the files below it hold data, and where.

The human form lists data only. The JSON form covers the whole disk.`,
		Args: oneImage,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			m := mapper{app: a, json: output == "json", max: -1}
			var err error
			if start != "" {
				if m.start, err = parseSize("start offset", start); err != nil {
					return err
				}
			}
			if length != "" {
				if m.max, err = parseSize("max length", length); err != nil {
					return err
				}
			}
			if err := src.set(args[0]); err != nil {
				return err
			}
			if picture != "" {
				return a.drawLayout(cmd.Context(), &src, picture)
			}
			return m.run(cmd, &src)
		},
	}
	src.add(cmd)
	src.noData = true
	outputFlag(cmd, &output)
	cmd.Flags().StringVarP(&start, "start-offset", "s", "", "begin at `OFFSET`")
	cmd.Flags().StringVarP(&length, "max-length", "l", "", "cover at most `LENGTH` bytes")
	if a.name == program {
		cmd.Flags().StringVar(&picture, "picture", "", "draw a picture instead, in `FILE`: .svg or .png")
	}
	src.policy.add(cmd.Flags())
	return cmd
}

// mapper prints extents, each as soon as it is known that the next one does not continue it.
type mapper struct {
	*app
	json       bool
	start, max int64

	pending    block.Extent
	hasPending bool
	printed    bool
	failed     error
	to         io.Writer
	line       []byte
}

func (m *mapper) run(cmd *cobra.Command, src *source) (err error) {
	if err := src.checkFormat(); err != nil {
		return err
	}
	dev, err := block.Open(cmd.Context(), src.name, src.openOptions())
	if err != nil {
		return openError(src.name, err)
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	// There may be millions of lines.
	lines := bufio.NewWriterSize(m.out, 64<<10)
	defer func() { err = errors.Join(err, lines.Flush()) }()
	m.to, m.app = lines, &app{name: m.name, in: m.in, out: lines, err: m.err}
	if m.json {
		m.printf("[")
	} else {
		m.printf("%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File")
	}
	n := max(dev.Size()-m.start, 0)
	if m.max >= 0 {
		n = min(n, m.max)
	}
	if n > 0 {
		if err := dev.Extents(cmd.Context(), m.start, n, m.add); err != nil {
			return errorf("Failed to read image metadata: %w", err)
		}
	}
	if m.failed != nil {
		return m.failed
	}
	m.flush()
	if m.failed != nil {
		return m.failed
	}
	if !m.json {
		return nil
	}
	if !m.printed {
		// qemu-img says this of an empty range.
		m.entry(block.Extent{Off: m.start})
	}
	m.printf("]\n")
	return nil
}

// add takes the next extent and tells whether to go on.
func (m *mapper) add(e block.Extent) bool {
	if !m.json && e.Zero {
		e.Data = false // the human form leaves out what reads as zeroes
	}
	if m.hasPending && m.pending.SameState(e) {
		m.pending.Len += e.Len
		return true
	}
	m.flush()
	m.pending, m.hasPending = e, true
	return m.failed == nil
}

func (m *mapper) flush() {
	if !m.hasPending {
		return
	}
	e := m.pending
	m.hasPending = false
	if m.json {
		m.entry(e)
		return
	}
	if !e.Data {
		return
	}
	if !e.HasHost {
		m.failed = errorf("File contains external, encrypted or compressed clusters.")
		return
	}
	m.printf("%-16s%-16s%-16s%s\n", hex(e.Off), hex(e.Len), hex(e.Host), e.File)
}

// hex is C's %#x, which writes zero without a prefix.
func hex(n int64) string {
	if n == 0 {
		return "0"
	}
	return fmt.Sprintf("%#x", n)
}

func (m *mapper) entry(e block.Extent) {
	if m.printed {
		_, _ = io.WriteString(m.to, ",\n")
	}
	m.printed = true
	b := m.line[:0]
	for _, f := range []struct {
		name  string
		value int64
	}{{`{ "start": `, e.Off}, {`, "length": `, e.Len}, {`, "depth": `, int64(e.Depth)}} {
		b = strconv.AppendInt(append(b, f.name...), f.value, 10)
	}
	b = strconv.AppendBool(append(b, `, "present": `...), e.Allocated)
	b = strconv.AppendBool(append(b, `, "zero": `...), e.Zero)
	b = strconv.AppendBool(append(b, `, "data": `...), e.Data)
	if e.HasHost {
		b = strconv.AppendInt(append(b, `, "offset": `...), e.Host, 10)
	}
	m.line = append(b, '}')
	_, _ = m.to.Write(m.line)
}
