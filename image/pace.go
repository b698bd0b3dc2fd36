package image

import (
	"context"
	"time"
)

// pace holds work to a rate.
type pace struct {
	rate  int64 // bytes a second; 0 means no bound
	began time.Time
	spent int64
}

func newPace(rate int64) pace { return pace{rate: rate, began: time.Now()} }

// spend notes n bytes and waits until the rate allows more.
func (p *pace) spend(ctx context.Context, n int64) error {
	if p.rate <= 0 {
		return nil
	}
	p.spent += n
	due := p.began.Add(time.Duration(float64(p.spent) / float64(p.rate) * float64(time.Second)))
	wait := time.NewTimer(time.Until(due))
	defer wait.Stop()
	select {
	case <-wait.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
